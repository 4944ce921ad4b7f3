import { between, noise } from "./noise.js";

const byId = (id) => document.getElementById(id);
const say = (text, failed = false) => {
  byId("status").textContent = text;
  byId("status").classList.toggle("failed", failed);
};
const megabytes = (bytes) => (bytes / 2 ** 20).toFixed(1);
const MAX_SEED = (1n << 64n) - 1n;

/** The bytes of a file, with what has arrived. */
async function bytesOf(name, arrived) {
  const answer = await fetch(name);
  if (!answer.ok) throw new Error(`${name} cannot be loaded (${answer.status})`);
  const parts = [];
  const reader = answer.body.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    parts.push(part.value);
    arrived(part.value.length);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

/** ONNX Runtime with WebGPU if the browser has a device, else with WASM: one thread without the headers of isolation. */
async function startRuntime(place) {
  const gpu = navigator.gpu ? await navigator.gpu.requestAdapter().catch(() => null) : null;
  const ort = await import(`${place}/ort.${gpu ? "webgpu" : "wasm"}.min.mjs`);
  ort.env.wasm.wasmPaths = new URL(`${place}/`, import.meta.url).href;
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  ort.env.logLevel = "error";
  return { ort, provider: gpu ? "webgpu" : "wasm" };
}

/** Images (n, C, H, W) in [−1, 1] as a square of pictures on a canvas. */
function show(canvas, images, [channels, height, width], count) {
  const columns = Math.ceil(Math.sqrt(count));
  [canvas.width, canvas.height] = [columns * width, Math.ceil(count / columns) * height];
  const context = canvas.getContext("2d");
  const size = height * width;
  for (let k = 0; k < count; k++) {
    const picture = context.createImageData(width, height);
    for (let i = 0; i < size; i++) {
      for (let c = 0; c < 3; c++) {
        const value = images[(k * channels + (channels === 1 ? 0 : c)) * size + i];
        picture.data[4 * i + c] = Math.round((value + 1) * 127.5);
      }
      picture.data[4 * i + 3] = 255;
    }
    context.putImageData(picture, (k % columns) * width, Math.floor(k / columns) * height);
  }
}

/** A figure with a caption of two parts. */
function figure(title, part) {
  const whole = document.createElement("figure"), caption = document.createElement("figcaption");
  const time = document.createElement("span");
  caption.append(title, time);
  whole.append(part, caption);
  byId("grids").append(whole);
  return time;
}

/** What the form asks for; null while a seed is not a number. */
function asked() {
  const [seed, second] = ["seed", "second"].map((id) => {
    const word = byId(id).value.trim();
    const is_right = /^[0-9]+$/.test(word) && BigInt(word) <= MAX_SEED;
    byId(id).setAttribute("aria-invalid", String(!is_right));
    return is_right ? BigInt(word) : null;
  });
  if (seed === null || second === null) return null;
  const count = Number(byId("count").value), part = Number(byId("part").value) / 100;
  return { seed, second, part, count, label: byId("class").value, guidance: Number(byId("guidance").value) };
}

const memory = new Map();
function remembered(seed, image, length) {
  const name = `${seed} ${image}`;
  if (!memory.has(name)) {
    if (memory.size > 256) memory.clear();
    memory.set(name, noise(seed, image, length));
  }
  return memory.get(name);
}

/** The inputs of a model, by name. */
function inputsOf(ort, page, model, want) {
  const length = page.shape.reduce((a, b) => a * b);
  const all = new Float32Array(want.count * length);
  for (let k = 0; k < want.count; k++) {
    const first = remembered(want.seed, k, length);
    const mixed = want.part ? between(first, remembered(want.second, k, length), want.part) : first;
    all.set(mixed, k * length);
  }
  const found = { noise: new ort.Tensor("float32", all, [want.count, ...page.shape]) };
  if (page.classes.length) {
    const chosen = want.label === "" ? (k) => k % page.classes.length : () => Number(want.label);
    found.classes = new ort.Tensor("int64", BigInt64Array.from({ length: want.count }, (_, k) => BigInt(chosen(k))), [want.count]);
  }
  if (model.guidance) found.guidance = new ort.Tensor("float32", new Float32Array(want.count).fill(want.guidance), [want.count]);
  return found;
}

async function main() {
  const answer = await fetch("models.json");
  const page = await answer.json();
  const total = page.models.reduce((sum, model) => sum + model.bytes, 0);
  let arrived = 0;
  const { ort, provider } = await startRuntime(page.runtime);
  const models = [];
  for (const model of page.models) {
    const bytes = await bytesOf(model.file, (more) => {
      arrived += more;
      byId("loaded").value = arrived / total;
      say(`Loading: ${megabytes(arrived)} of ${megabytes(total)} MB`);
    });
    const session = await ort.InferenceSession.create(bytes, { executionProviders: [provider] });
    models.push({ ...model, session });
  }
  byId("loaded").hidden = true;
  byId("runtime").textContent =
    `ONNX Runtime, ${provider === "webgpu" ? "WebGPU" : `WASM, threads: ${ort.env.wasm.numThreads}`}. Nothing leaves this device.`;

  byId("class").add(new Option("each in turn", ""));
  page.classes.forEach((name, k) => byId("class").add(new Option(name, k)));
  byId("of_class").hidden = !page.classes.length;
  const ranges = page.models.map((model) => model.guidance).filter(Boolean);
  byId("of_guidance").hidden = !ranges.length;
  if (ranges.length) [byId("guidance").min, byId("guidance").max, byId("guidance").value] = [ranges[0][0], ranges[0][1], ranges[0][0]];

  for (const model of models) {
    model.canvas = document.createElement("canvas");
    model.canvas.setAttribute("role", "img");
    model.canvas.setAttribute("aria-label", `Images by ${model.name}`);
    model.time = figure(`${model.name}, ${model.steps} ${model.steps === 1 ? "step" : "steps"}`, model.canvas);
  }
  if (page.teacher) {
    const image = new Image();
    [image.src, image.alt] = ["teacher.png", `Images by the teacher ${page.teacher.name}, seed 0`];
    figure(`teacher ${page.teacher.name}, ${page.teacher.steps} steps, seed 0, drawn beforehand`, image);
  }

  let want = null, busy = false;
  self.vdiff = { drawn: 0, images: {} };
  const draw = async () => {
    want = asked();
    if (!want) return say("A seed is a whole number from 0 to 18446744073709551615.", true);
    if (busy) return undefined;
    busy = true;
    while (want) {
      const now = want;
      want = null;
      for (const model of models) {
        const inputs = inputsOf(ort, page, model, now);
        const began = performance.now();
        const { images } = await model.session.run(inputs);
        const values = await images.getData();
        model.time.textContent = `: ${((performance.now() - began) / now.count).toFixed(1)} ms per image`;
        show(model.canvas, values, page.shape, now.count);
        self.vdiff.images[model.file] = values;
        if (want) break;
      }
    }
    busy = false;
    self.vdiff.drawn++;
    return say("Drawn.");
  };
  const redraw = () => draw().catch(failed);
  byId("controls").addEventListener("input", redraw);
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("another").addEventListener("click", () => {
    byId("seed").value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
    redraw();
  });
  byId("save").addEventListener("click", () => {
    const whole = document.createElement("canvas");
    whole.width = models.reduce((sum, model) => sum + model.canvas.width, 0);
    whole.height = Math.max(...models.map((model) => model.canvas.height));
    let left = 0;
    for (const { canvas } of models) {
      whole.getContext("2d").drawImage(canvas, left, 0);
      left += canvas.width;
    }
    whole.toBlob((blob) => {
      const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: `seed-${byId("seed").value}.png` });
      link.click();
      URL.revokeObjectURL(link.href);
    });
  });
  await draw();
}

function failed(error) {
  const file = location.protocol === "file:" ? " Open this folder by a web server: python -m http.server" : "";
  const wasm = typeof WebAssembly === "undefined" ? " This browser has no WebAssembly." : "";
  say(`This page cannot draw: ${error.message}.${file}${wasm}`, true);
}

main().catch(failed);
