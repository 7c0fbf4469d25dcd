"use strict";
// Pictures shown again, playing clips, the filters, and names under the pointer. The page is whole without it.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // A picture is in the page once; where it is shown again it is taken from there.
  for (const element of all("[data-of]")) {
    const first = document.getElementById(element.dataset.of);
    const uri = first.getAttribute("src") || first.getAttribute("poster");
    if (element.tagName === "VIDEO") element.poster = uri;
    else { element.loading = "lazy"; element.src = uri; }
  }

  // Clips: a player only for those in view, since browsers allow but a few dozen.
  const table = JSON.parse(document.getElementById("clips").textContent);
  const addresses = {};
  const addressOf = (key) => {
    if (!addresses[key]) {
      const [head, data] = table[key].split(";base64,");
      const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
      addresses[key] = URL.createObjectURL(new Blob([bytes], { type: head.slice("data:".length) }));
    }
    return addresses[key];
  };
  const videos = all("video[data-clip]");
  const inView = new Set();
  const calm = window.matchMedia("(prefers-reduced-motion: reduce)");
  let playing = !calm.matches;
  const start = (video) => {
    if (!video.hasAttribute("src")) video.src = addressOf(video.dataset.clip);
    video.play().catch((error) => {  // out of view again, or the browser forbids it: the still remains
      if (error.name !== "AbortError" && error.name !== "NotAllowedError") throw error;
    });
  };
  const stop = (video) => {
    if (!video.hasAttribute("src")) return;
    video.removeAttribute("src");
    video.load();
  };
  const observer = new IntersectionObserver((changes) => {
    for (const { target, isIntersecting } of changes) {
      if (isIntersecting) {
        inView.add(target);
        if (playing) start(target);
      } else {
        inView.delete(target);
        stop(target);
      }
    }
  }, { rootMargin: "120px" });
  videos.forEach((video) => observer.observe(video));
  const button = document.querySelector(".tools button");
  const setPlaying = (now) => {
    playing = now;
    button.textContent = playing ? "Pause clips" : "Play clips";
    button.setAttribute("aria-pressed", String(!playing));
    for (const video of inView) {
      if (playing) start(video);
      else video.pause();
    }
  };
  if (button) {
    setPlaying(playing);
    button.addEventListener("click", () => setPlaying(!playing));
    calm.addEventListener("change", () => setPlaying(!calm.matches));
  }

  // Sound: of one clip at a time, and of none until asked for.
  const speakers = all(".film > button");
  for (const speaker of speakers) {
    speaker.addEventListener("click", () => {
      const on = speaker.getAttribute("aria-pressed") === "false";
      for (const each of speakers) {
        const heard = on && each === speaker;
        each.setAttribute("aria-pressed", String(heard));
        each.previousElementSibling.muted = !heard;
      }
      if (on) start(speaker.previousElementSibling);
    });
  }

  // Filters.
  const form = document.querySelector(".tools");
  const search = form.querySelector("input[type=search]");
  const count = form.querySelector("output");
  const plain = (text) => text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();
  const groups = all("#matches > section").map((section) => ({
    none: section.querySelector(".none"),
    entries: all("article", section).map((element) => ({
      element,
      verdict: element.dataset.verdict,
      text: plain(all("[data-name]", element).map((name) => name.textContent).join(" ")),
    })),
  }));
  const marks = all("[data-tip]").map((element) => ({ element, text: plain(element.dataset.tip) }));
  const total = groups.reduce((sum, group) => sum + group.entries.length, 0);
  const filter = () => {
    const words = plain(search.value).split(/\s+/).filter(Boolean);
    const chosen = form.querySelector("input[name=verdict]:checked");
    const verdict = chosen ? chosen.value : "all";
    const has = (text) => words.every((word) => text.includes(word));
    let shown = 0;
    for (const { none, entries } of groups) {
      let here = 0;
      for (const entry of entries) {
        const fits = (verdict === "all" || entry.verdict === verdict) && has(entry.text);
        entry.element.hidden = !fits;
        here += fits;
      }
      none.hidden = here > 0;
      shown += here;
    }
    for (const { element, text } of marks) element.classList.toggle("dim", !has(text));
    count.textContent = `${shown.toLocaleString("en")} of ${total.toLocaleString("en")}`;
  };
  let asked = false;
  const soon = () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => { asked = false; filter(); });
  };
  form.addEventListener("input", soon);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = total < 2;
  filter();

  // Names under the pointer: of points, and of the cells of a heat map.
  const tip = document.getElementById("tip");
  const say = (event, text) => {
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 12, window.innerWidth - width - 4))}px`;
    tip.style.top = `${event.clientY > height + 16 ? event.clientY - height - 10 : event.clientY + 18}px`;
  };
  const depths = new Map();
  const depthsOf = (image) => {
    if (!depths.has(image)) {
      const canvas = document.createElement("canvas");
      canvas.width = image.naturalWidth;
      canvas.height = image.naturalHeight;
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.drawImage(image, 0, 0);
      depths.set(image, context.getImageData(0, 0, canvas.width, canvas.height).data);
    }
    return depths.get(image);
  };
  const cell = (event) => {
    const image = event.target;
    const { rows, columns, low, high } = JSON.parse(image.dataset.heat);
    const box = image.getBoundingClientRect();
    const place = (at, size, cells) => Math.max(0, Math.min(cells - 1, Math.floor((at / size) * cells)));
    const column = place(event.clientX - box.left, box.width, image.naturalWidth);
    const row = place(event.clientY - box.top, box.height, image.naturalHeight);
    const score = low + (high - low) * depthsOf(image)[4 * (row * image.naturalWidth + column) + 3] / 255;
    const names = rows.length ? `${rows[row]} × ${columns[column]}: ` : "";
    return `${names}about ${score.toPrecision(2)}`;
  };
  for (const kind of ["pointermove", "pointerdown"]) {
    document.addEventListener(kind, (event) => {
      const { target } = event;
      say(event, !(target instanceof Element) ? "" : target.matches("[data-heat]") ? cell(event) : target.dataset.tip || "");
    });
  }
})();
