// Back end in the browser: the samplers as ONNX graphs, run by ONNX Runtime with WebGPU or WASM.

import { between, noise } from "./noise.js";
import { tokenizer } from "./tokens.js";

const megabytes = (bytes) => (bytes / 2 ** 20).toFixed(1);
const SIMD = Uint8Array.of(0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11);

/** What this browser lacks, in words; empty if it can draw. */
export function missing() {
  if (typeof WebAssembly === "undefined") return "This browser has no WebAssembly; use a newer one.";
  if (!WebAssembly.validate(SIMD)) return "This browser has no SIMD in WebAssembly; use a newer one.";
  return "";
}

/** The bytes of a file; `arrived` gets the number of bytes of each part. */
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
  return { ort, providers: gpu ? ["webgpu", "wasm"] : ["wasm"] };
}

/** Images (n, C, H, W) in [−1, 1] as one canvas without gaps. */
function sheetOf(values, [channels, height, width], count) {
  const columns = Math.ceil(Math.sqrt(count)), size = height * width;
  const sheet = Object.assign(document.createElement("canvas"), { width: columns * width, height: Math.ceil(count / columns) * height });
  const context = sheet.getContext("2d");
  for (let k = 0; k < count; k++) {
    const picture = context.createImageData(width, height);
    for (let i = 0; i < size; i++) {
      for (let c = 0; c < 3; c++) {
        picture.data[4 * i + c] = Math.round((values[(k * channels + (channels === 1 ? 0 : c)) * size + i] + 1) * 127.5);
      }
      picture.data[4 * i + 3] = 255;
    }
    context.putImageData(picture, (k % columns) * width, Math.floor(k / columns) * height);
  }
  return { sheet, columns };
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

/** Noise (n, C, H, W) of a seed, or between two. */
function noiseOf(shape, want) {
  const length = shape.reduce((a, b) => a * b), all = new Float32Array(want.count * length);
  for (let k = 0; k < want.count; k++) {
    const first = remembered(want.seed, k, length);
    all.set(want.blend ? between(first, remembered(want.second, k, length), want.blend) : first, k * length);
  }
  return all;
}

/** Load all models; `say` and `progress` show how much has arrived. */
export async function openBrowser(page, say, progress) {
  const graphs = [page.text, page.decoder, ...page.models].filter(Boolean);
  const total = graphs.reduce((sum, graph) => sum + graph.bytes, 0);
  let arrived = 0;
  const { ort, providers } = await startRuntime(page.runtime);
  const sessions = new Map();
  const load = async (file) => {
    const bytes = await bytesOf(file, (more) => {
      arrived += more;
      progress(arrived / total);
      say(`Loading: ${megabytes(arrived)} of ${megabytes(total)} MB`);
    });
    return ort.InferenceSession.create(bytes, { executionProviders: providers });
  };
  for (const { file } of graphs) sessions.set(file, await load(file));
  const tokensOf = page.text ? tokenizer(await (await fetch("tokenizer.json")).json()) : null;

  /** The embedding of a prompt, repeated for each image; prompts are encoded once. */
  let known = { prompt: null };
  const encode = async (prompt, count) => {
    if (known.prompt !== prompt) {
      const { tokens, isCut } = tokensOf(prompt);
      const numbers = new ort.Tensor("int64", BigInt64Array.from(tokens, BigInt), [1, tokens.length]);
      const { output } = await sessions.get(page.text.file).run({ tokens: numbers });
      known = { prompt, isCut, values: await output.getData(), shape: output.dims.slice(1) };
    }
    const size = known.values.length, all = new Float32Array(count * size);
    for (let k = 0; k < count; k++) all.set(known.values, k * size);
    return new ort.Tensor("float32", all, [count, ...known.shape]);
  };

  return {
    note: `ONNX Runtime, ${providers[0] === "webgpu" ? "WebGPU" : `WASM, threads: ${ort.env.wasm.numThreads}`}. Nothing leaves this device.`,
    async draw(model, want) {
      const { count } = want;
      const inputs = { noise: new ort.Tensor("float32", noiseOf(page.noise, want), [count, ...page.noise]) };
      if (page.classes.length) {
        const label = (k) => BigInt(want.label ?? k % page.classes.length);
        inputs.classes = new ort.Tensor("int64", BigInt64Array.from({ length: count }, (_, k) => label(k)), [count]);
      }
      if (model.guidance) inputs.guidance = new ort.Tensor("float32", new Float32Array(count).fill(want.guidance), [count]);
      const began = performance.now();
      if (page.text) inputs.text = await encode(want.prompt, count);
      let { images } = await sessions.get(model.file).run(inputs);
      if (page.decoder) images = (await sessions.get(page.decoder.file).run({ latents: images })).output;
      const values = await images.getData();
      const milliseconds = performance.now() - began;
      return { ...sheetOf(values, page.shape, count), milliseconds, values, notes: known.isCut ? ["The end of the prompt is cut off."] : [] };
    },
  };
}
