// Tokens of a prompt, as CLIP's tokenizer makes them: byte pairs of lower-case words (Radford et al. 2021).

const WORDS = /<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+/gu;

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

/** text → `length` numbers, of which the first is `start` and the last ones are `end` and padding; and what is cut. */
export function tokenizer({ vocab, merges, start, end, unknown, padding, length }) {
  const ranks = new Map(merges.map((pair, rank) => [pair, rank])), letter = letters();
  const special = { "<|startoftext|>": start, "<|endoftext|>": end };

  const numbers = (word) => {
    if (word in special) return [special[word]];
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

  return (text) => {
    const lower = [...text.normalize("NFC")].map((one) => one.toLowerCase()).join("");
    const found = (lower.match(WORDS) ?? []).flatMap(numbers), kept = found.slice(0, length - 2);
    const all = [start, ...kept, end];
    return { tokens: [...all, ...Array(length - all.length).fill(padding)], isCut: found.length > kept.length };
  };
}
