// Back end on a server: `vdiff serve` draws, and answers with one PNG of all images.

const token = new URLSearchParams(location.hash.slice(1)).get("token");
const headers = token ? { Authorization: `Bearer ${token}` } : {};

/** A request with the token that stands after # in the address. */
export async function ask(name, more = {}) {
  const answer = await fetch(name, { ...more, headers: { ...headers, ...more.headers } });
  if (answer.ok) return answer;
  if (answer.status === 401) throw new Error("this server asks for a token: open the address that vdiff serve printed");
  const told = await answer.json().catch(() => ({}));
  throw new Error(told.error ?? `${name}: status ${answer.status}`);
}

export function openServer(page) {
  return {
    note: `Drawn by vdiff on ${location.hostname}, ${page.device}.`,
    async draw(model, want) {
      const asked = {
        model: model.name, count: want.count, seed: String(want.seed),
        ...(want.blend ? { second_seed: String(want.second), blend: want.blend } : {}),
        ...(want.label === null ? {} : { classes: [page.classes[want.label]] }),
        ...(page.prompt === null ? {} : { prompts: [want.prompt] }),
        ...(model.guidance ? { guidance: want.guidance } : {}),
      };
      const json = { "Content-Type": "application/json" };
      const answer = await ask(page.draw, { method: "POST", headers: json, body: JSON.stringify(asked) });
      const sheet = await createImageBitmap(await answer.blob());
      const milliseconds = Number(/dur=([\d.]+)/.exec(answer.headers.get("Server-Timing"))?.[1] ?? NaN);
      return { sheet, columns: Math.ceil(Math.sqrt(want.count)), milliseconds, notes: JSON.parse(answer.headers.get("X-Notes") ?? "[]") };
    },
  };
}
