// Noise of vdiff: N(0, 1) in float32, equal to numpy's Generator(Philox(key=[seed, image])).standard_normal.
// Philox4x64-10: Salmon et al. 2011. Ziggurat of 256 layers: Marsaglia and Tsang 2000, with 23 bits as in numpy.

const MASK = (1n << 64n) - 1n;
const MULTIPLIERS = [0xd2e7470ee14c6c93n, 0xca5a826395121157n];
const WEYL = [0x9e3779b97f4a7c15n, 0xbb67ae8584caa73bn];

/** The four 64-bit numbers of a counter and a key (two numbers each of 64 bits). */
function philox(counter, key) {
  let [a, b, c, d] = [counter, 0n, 0n, 0n];
  let [k0, k1] = key;
  for (let round = 0; round < 10; round++) {
    if (round) {
      k0 = (k0 + WEYL[0]) & MASK;
      k1 = (k1 + WEYL[1]) & MASK;
    }
    const first = MULTIPLIERS[0] * a, second = MULTIPLIERS[1] * c;
    [a, b, c, d] = [(second >> 64n) ^ b ^ k0, second & MASK, (first >> 64n) ^ d ^ k1, first & MASK];
  }
  return [a, b, c, d];
}

// Layers of equal area under exp(-x²/2): the last one begins at R and has the tail; AREA is that of each.
const R = 3.6541528853610088, AREA = 0.004928673233974658, BITS = 2 ** 23;
const width = new Float32Array(256), height = new Float32Array(256), inside = new Uint32Array(256);
{
  const density = (x) => Math.exp(-0.5 * x * x);
  let edge = R, outer = R;
  const base = AREA / density(R);
  [inside[0], inside[1]] = [Math.floor((R / base) * BITS), 0];
  [width[0], width[255], height[0], height[255]] = [base / BITS, R / BITS, 1, density(R)];
  for (let k = 254; k >= 1; k--) {
    edge = Math.sqrt(-2 * Math.log(AREA / edge + density(edge)));
    inside[k + 1] = Math.floor((edge / outer) * BITS);
    outer = edge;
    height[k] = density(edge);
    width[k] = edge / BITS;
  }
}

/** The first `count` numbers of image `image` of `seed` (BigInt, 0 to 2⁶⁴ − 1). */
export function noise(seed, image, count) {
  const key = [BigInt(seed) & MASK, BigInt(image)];
  let counter = 0n, words = [], place = 0;
  const next = () => {
    if (place === words.length) {
      words = philox(++counter, key).flatMap((each) => [Number(each & 0xffffffffn), Number(each >> 32n)]);
      place = 0;
    }
    return words[place++];
  };
  const uniform = () => (next() >>> 8) / 2 ** 24;
  const { fround } = Math;
  const draw = () => {
    for (;;) {
      const bits = next(), layer = bits & 255, magnitude = (bits >>> 9) & 0x7fffff;
      const size = fround(magnitude * width[layer]), sign = bits & 256 ? -1 : 1;
      if (magnitude < inside[layer]) return sign * size;
      if (layer === 0) {
        for (;;) {
          const beyond = fround(-fround(1 / R) * fround(Math.log1p(-uniform())));
          const level = fround(-Math.log1p(-uniform()));
          if (level + level > beyond * beyond) return fround(R + beyond) * (magnitude & 256 ? -1 : 1);
        }
      }
      const [low, high] = [height[layer], height[layer - 1]];
      if (fround(fround((high - low) * uniform()) + low) < Math.exp(-0.5 * size * size)) return sign * size;
    }
  };
  return Float32Array.from({ length: count }, draw);
}

/** Noise between two: cos(φ) a + sin(φ) b with φ = part · π/2, which is N(0, I) too. */
export function between(a, b, part) {
  const angle = (part * Math.PI) / 2, [near, far] = [Math.cos(angle), Math.sin(angle)];
  return a.map((value, k) => near * value + far * b[k]);
}
