
"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("scripted");

  // Colours: as the system has them, or light, or dark; remembered where the browser lets a page remember.
  const themes = { auto: "Auto", light: "Light", dark: "Dark" };
  const order = Object.keys(themes);
  const button = document.getElementById("theme");
  let theme = "auto";
  try { theme = localStorage.getItem("vdiff-theme") || "auto"; } catch { /* not allowed: as the system */ }
  const paint = () => {
    if (!themes[theme]) theme = "auto";
    if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
    button.textContent = themes[theme];
    button.setAttribute("aria-label", `${themes[theme]} colours`);
  };
  button.addEventListener("click", () => {
    theme = order[(order.indexOf(theme) + 1) % order.length];
    try { localStorage.setItem("vdiff-theme", theme); } catch { /* for this visit alone */ }
    paint();
  });
  paint();

  // Copying a command.
  for (const copy of document.querySelectorAll(".copy")) {
    copy.addEventListener("click", async () => {
      const code = copy.parentElement.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
      } catch {
        const range = document.createRange();
        range.selectNodeContents(code);
        getSelection().removeAllRanges();
        getSelection().addRange(range);
        document.execCommand("copy");
      }
      copy.textContent = "Copied";
      setTimeout(() => { copy.textContent = "Copy"; }, 1600);
    });
  }

  // Enlarging a picture; the rows of the ladder follow each other in the same place.
  const viewer = document.getElementById("viewer");
  const body = document.getElementById("viewer-body");
  const title = document.getElementById("viewer-title");
  const back = document.getElementById("viewer-back");
  const on = document.getElementById("viewer-on");
  const rungs = [...document.querySelectorAll('.zoom[data-view="strip"]')];
  let at = -1;
  const show = (zoom) => {
    const image = zoom.querySelector("img");
    at = rungs.indexOf(zoom);
    title.textContent = zoom.dataset.title || image.alt;
    back.hidden = on.hidden = at < 0;
    back.disabled = at <= 0;
    on.disabled = at === rungs.length - 1;
    if (at < 0) {
      const large = image.cloneNode();
      body.replaceChildren(large);
      return;
    }
    const count = Number(zoom.dataset.count);
    const width = Number(image.getAttribute("width"));
    const side = Number(image.getAttribute("height"));
    const tiles = document.createElement("div");
    tiles.className = "tiles";
    tiles.setAttribute("role", "img");
    tiles.setAttribute("aria-label", image.alt);
    for (let k = 0; k < count; k++) {
      const tile = document.createElement("div");
      if (image.classList.contains("pixels")) tile.className = "pixels";
      tile.style.backgroundImage = `url("${image.src}")`;
      tile.style.backgroundSize = `${100 * width / side}% 100%`;
      tile.style.backgroundPosition = `${count > 1 ? 100 * k / (count - 1) : 0}% 0`;
      tiles.append(tile);
    }
    body.replaceChildren(tiles);
  };
  const step = (by) => {
    if (at >= 0 && rungs[at + by]) show(rungs[at + by]);
  };
  for (const zoom of document.querySelectorAll(".zoom")) {
    zoom.setAttribute("aria-haspopup", "dialog");
    zoom.addEventListener("click", () => { show(zoom); viewer.showModal(); });
  }
  back.addEventListener("click", () => step(-1));
  on.addEventListener("click", () => step(1));
  document.getElementById("viewer-close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
  viewer.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  viewer.addEventListener("close", () => { if (at >= 0) rungs[at].focus(); });

  // On paper everything is open.
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details:not([open])")) {
      details.open = true;
      details.dataset.printed = "";
    }
  });
  addEventListener("afterprint", () => {
    for (const details of document.querySelectorAll("details[data-printed]")) {
      details.open = false;
      delete details.dataset.printed;
    }
  });
})();
