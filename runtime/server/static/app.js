"use strict";
// Asks the server this page came from, by the API that any client uses.
const $ = (id) => document.getElementById(id);
let picture = null, running = null;

const headers = () => {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
};

function mistake(text) {
  $("mistake").textContent = text;
  $("mistake").hidden = !text;
}

async function loadModels() {
  try {
    const answer = await fetch("/v1/models", { headers: headers() });
    const data = await answer.json();
    if (!answer.ok) throw new Error(data.error.message);
    $("model").replaceChildren(...data.data.map((one) => new Option(`${one.id} (${one.recipe})`, one.id)));
    mistake("");
  } catch (error) {
    mistake(error.message);
  }
}

function show(file) {
  if (!file || !file.type.startsWith("image/")) return;
  const reader = new FileReader();
  reader.onload = () => {
    picture = reader.result;
    $("picture").src = picture;
    $("hint").hidden = true;
    $("frame").hidden = $("legend").hidden = false;
    erase();
  };
  reader.readAsDataURL(file);
}

function erase() {
  const canvas = $("overlay");
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
  delete canvas.dataset.drawn;
}

// Far apart one after another
const colour = (group) => `hsl(${(group * 137.5) % 360} 85% 55% / .55)`;

// The part of the picture that the model sees: all of it, or the square in its middle.
function region(image, grid) {
  const wide = image.naturalWidth, high = image.naturalHeight;
  if (grid.fit !== "crop") return [0, 0, wide, high];
  const side = Math.min(wide, high);
  return [(wide - side) / 2, (high - side) / 2, side, side];
}

function draw(grid) {
  const canvas = $("overlay"), image = $("picture"), context = canvas.getContext("2d");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const [x, y, wide, high] = region(image, grid);
  const w = wide / grid.columns, h = high / grid.rows;
  context.lineWidth = Math.max(1, w / 24);
  grid.patches.forEach((fate, n) => {
    const left = x + (n % grid.columns) * w, top = y + Math.floor(n / grid.columns) * h;
    if (fate < 0) context.fillStyle = "rgb(0 0 0 / .72)";
    else if (fate > 0) context.fillStyle = colour(fate);
    if (fate) context.fillRect(left, top, w, h);
    else {
      context.strokeStyle = "rgb(22 163 74 / .8)";
      context.strokeRect(left + 1, top + 1, w - 2, h - 2);
    }
  });
  canvas.dataset.drawn = grid.patches.length;
}

const bytes = (n) => (n < 1e6 ? `${(n / 1e3).toFixed(1)} kB` : `${(n / 1e6).toFixed(1)} MB`);

function figures(told) {
  const layers = told.image_tokens_per_layer;
  const rows = [
    ["First token", `${told.first_token_ms.toFixed(0)} ms`],
    ["Speed", `${told.tokens_per_second.toFixed(1)} tokens/s`],
    ["Prompt", `${told.prompt_tokens} tokens, ${told.reused_tokens} read before`],
    ["Image tokens", `${told.image_tokens} encoded, ${layers[layers.length - 1] ?? 0} in the last layer`],
    ["Answer", `${told.new_tokens} tokens`],
    ["Cache", `${bytes(told.cache_bytes)} of ${bytes(told.full_cache_bytes)} in full`],
  ];
  $("figures").tBodies[0].replaceChildren(...rows.map((cells) => {
    const row = document.createElement("tr");
    cells.forEach((text) => { row.insertCell().textContent = text; });
    return row;
  }));
  $("figures").hidden = $("layers").hidden = false;
  bars(told.tokens_per_layer, told.kept_per_layer);
}

function bars(entered, kept) {
  const svg = $("bars"), most = Math.max(...entered, 1), wide = 100 / entered.length;
  svg.setAttribute("viewBox", "0 0 100 100");
  svg.setAttribute("preserveAspectRatio", "none");
  const bar = (layer, count, name) => {
    const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const high = (100 * count) / most;
    const place = { x: layer * wide, y: 100 - high, width: wide * 0.85, height: high, class: name };
    Object.entries(place).forEach(([key, value]) => rect.setAttribute(key, value));
    const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
    title.textContent = `layer ${layer}: ${count}`;
    rect.append(title);
    return rect;
  };
  svg.replaceChildren(
    ...entered.map((count, layer) => bar(layer, count, "in")),
    ...kept.map((count, layer) => bar(layer, count, "kept")));
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
  }
}

async function ask(event) {
  event.preventDefault();
  const text = $("question").value.trim();
  if (running || !text) return;
  const content = [{ type: "text", text }];
  if (picture) content.unshift({ type: "image_url", image_url: { url: picture } });
  const body = {
    model: $("model").value, stream: true, lvlm_details: true, messages: [{ role: "user", content }],
    ...(+$("keep").value ? { keep: $("keep").value / 100 } : {}),
    ...(+$("kv").value ? { kv_keep: $("kv").value / 100 } : {}),
  };
  running = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  $("answer").textContent = "";
  mistake("");
  erase();
  try {
    const answer = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal,
    });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    for await (const chunk of events(answer.body)) {
      if (chunk.error) throw new Error(chunk.error.message);
      $("answer").append(chunk.choices[0]?.delta?.content ?? "");
      if (chunk.lvlm) {
        figures(chunk.lvlm);
        if (chunk.lvlm.images.length) draw(chunk.lvlm.images[0]);
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") mistake(error.message);
  } finally {
    running = null;
    $("send").disabled = false;
    $("stop").disabled = true;
  }
}

function slider(id, shown) {
  $(id).addEventListener("input", () => {
    $(shown).textContent = +$(id).value ? `${$(id).value} %` : "as served";
  });
}

const drop = $("drop");
drop.addEventListener("click", () => $("file").click());
drop.addEventListener("keydown", (e) => { if (e.key === "Enter" || e.key === " ") $("file").click(); });
drop.addEventListener("dragover", (e) => { e.preventDefault(); drop.classList.add("over"); });
drop.addEventListener("dragleave", () => drop.classList.remove("over"));
drop.addEventListener("drop", (e) => { e.preventDefault(); drop.classList.remove("over"); show(e.dataTransfer.files[0]); });
document.addEventListener("paste", (e) => show([...e.clipboardData.files][0]));
$("file").addEventListener("change", (e) => show(e.target.files[0]));
$("clear").addEventListener("click", () => {
  picture = null;
  $("file").value = "";
  $("hint").hidden = false;
  $("frame").hidden = $("legend").hidden = true;
});
$("ask").addEventListener("submit", ask);
$("question").addEventListener("keydown", (e) => { if (e.key === "Enter" && !e.shiftKey) ask(e); });
$("stop").addEventListener("click", () => running?.abort());
$("key").addEventListener("change", loadModels);
slider("keep", "keep-shown");
slider("kv", "kv-shown");
loadModels();
