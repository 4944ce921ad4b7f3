// Tokens of a prompt, as CLIP's tokenizer makes them: byte pairs of lower-case words (Radford et al. 2021).

const WORDS = /'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\p{White_Space}\p{L}\p{N}]+/gu;

/** The letters that stand for bytes in the vocabulary: printable ones for themselves, others from U+0100 on. */
function letters() {
  const found = [];
  let next = 256;
  for (let byte = 0; byte < 256; byte++) {
    const isPrintable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    found.push(String.fromCharCode(isPrintable ? byte : next++));
  }
  return found;
}

/**
 * text → `length` numbers: `start`, the words, `end` and padding; and whether words are cut off.
 * `special` words are found in the text as it is, before it becomes lower case.
 */
export function tokenizer({ vocab, merges, special, start, end, unknown, padding, length }) {
  const ranks = new Map(merges.map((pair, rank) => [pair, rank])), letter = letters();
  const own = new Map(Object.entries(special));
  const escaped = (word) => word.replace(/[^\p{L}\p{N}]/gu, (one) => `\\u{${one.codePointAt(0).toString(16)}}`);
  const between = new RegExp(`(${[...own.keys()].map(escaped).join("|")})`, "u");

  const numbers = (word) => {
    const parts = [...new TextEncoder().encode(word)].map((byte) => letter[byte]);
    parts[parts.length - 1] += "</w>";
    for (;;) {
      let best = Infinity, place = -1;
      for (let k = 0; k + 1 < parts.length; k++) {
        const rank = ranks.get(`${parts[k]} ${parts[k + 1]}`);
        if (rank < best) [best, place] = [rank, k];
      }
      if (place < 0) return parts.map((part) => vocab[part] ?? unknown);
      const pair = `${parts[place]} ${parts[place + 1]}`;
      for (let k = 0; k + 1 < parts.length; k++) {
        if (`${parts[k]} ${parts[k + 1]}` === pair) parts.splice(k, 2, parts[k] + parts[k + 1]);
      }
    }
  };

  const plain = (text) => {
    const lower = [...text.normalize("NFC")].map((one) => one.toLowerCase()).join("");
    return (lower.match(WORDS) ?? []).flatMap(numbers);
  };

  return (text) => {
    const found = text.split(between).flatMap((part) => (own.has(part) ? [own.get(part)] : plain(part)));
    const kept = found.slice(0, length - 2);
    const all = [start, ...kept, end];
    return { tokens: [...all, ...Array(length - all.length).fill(padding)], isCut: found.length > kept.length };
  };
}
