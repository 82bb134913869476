"use strict";
// Asks the server this page came from, by the API that any client uses.
const $ = (id) => document.getElementById(id);
const models = new Map();
let image = null, running = null, grid = null;

const headers = () => {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
};

function element(tag, text, kind = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = kind;
  return made;
}

function mistake(text) {
  $("mistake").textContent = text;
  $("mistake").hidden = !text;
}

// What went wrong, as the server says it; where it asks for a key, there is a field for that.
async function refused(answer) {
  if (answer.status === 401) {
    $("access").hidden = false;
    $("api").hidden = true; // a link sends no key
    return new Error($("key").value ? "The server does not know this key." : "This server asks for a key.");
  }
  return new Error((await answer.json()).error.message);
}

async function loadModels() {
  try {
    const answer = await fetch("/v1/models", { headers: headers() });
    if (!answer.ok) throw await refused(answer);
    models.clear();
    (await answer.json()).data.forEach((one) => models.set(one.id, one));
    $("model").replaceChildren(...[...models.values()].map((one) => new Option(`${one.id} (${one.recipe})`, one.id)));
    usual();
    mistake("");
  } catch (error) {
    mistake(error.message);
  }
}

// Ratios: those that a model takes, as it has them where a request says nothing.
const ratios = { keep: "keep", kv: "kv_keep" };

function usual() {
  const model = models.get($("model").value);
  for (const [id, name] of Object.entries(ratios)) {
    const value = model?.[name] ?? null;
    $(id).parentElement.hidden = value === null;
    $(id).value = $(id).dataset.usual = Math.round(100 * (value ?? 1));
    shownRatio(id);
  }
}

function shownRatio(id) {
  $(id).parentElement.querySelector("output").textContent = `${$(id).value} %`;
}

const chosen = () => Object.fromEntries(Object.entries(ratios)
  .filter(([id]) => !$(id).parentElement.hidden && $(id).value !== $(id).dataset.usual)
  .map(([id, name]) => [name, $(id).value / 100]));

function take(file) {
  if (!file?.type.startsWith("image/")) return;
  const reader = new FileReader();
  reader.onload = () => { $("image").src = image = reader.result; shownImage(); };
  reader.readAsDataURL(file);
}

function shownImage() {
  mistake("");
  erase();
  $("hint").hidden = Boolean(image);
  $("frame").hidden = $("tools").hidden = !image;
  $("drop").classList.toggle("full", Boolean(image));
}

// The overlay: patches kept, merged and dropped

function erase() {
  grid = null;
  $("legend").hidden = $("shown").hidden = true;
  draw();
}

function overlay(told) {
  grid = told;
  const count = (kind) => told.patches.filter(kind).length;
  const [left, top, right, low] = told.box;
  const patches = (n) => `${n} ${n === 1 ? "patch" : "patches"}`, groups = Math.max(0, ...told.patches);
  const tokens = `${groups} ${groups === 1 ? "token" : "tokens"}`;
  const lost = told.encoder_merges ? "dropped, or mixed into kept ones at the encoder" : "dropped";
  $("legend").replaceChildren(...[
    ["kept", count((fate) => fate === 0), (n) => `${patches(n)} kept`],
    ["merged", count((fate) => fate > 0), (n) => `${patches(n)} merged into ${tokens}, a colour each`],
    ["dropped", count((fate) => fate < 0), (n) => `${patches(n)} ${lost}`],
    ["beyond", Math.max(left, top, 1 - right, 1 - low) > 0.01, () => "outside what the model sees"],
  ].filter(([, n]) => n).map(([kind, n, text]) => element("li", text(n), kind)));
  $("legend").hidden = $("shown").hidden = false;
  draw();
}

// Far apart one after another
const colour = (group) => `hsl(${(group * 137.5) % 360} 90% 55% / .5)`;

function draw() {
  const canvas = $("overlay"), context = canvas.getContext("2d");
  // As many pixels as the screen shows, however large the image is
  const wide = canvas.width = Math.round(canvas.clientWidth * devicePixelRatio);
  const high = canvas.height = Math.round(canvas.clientHeight * devicePixelRatio);
  delete canvas.dataset.drawn;
  if (!grid || !$("show").checked) return;
  const [left, top, right, low] = grid.box;
  const x = (column) => Math.round(wide * (left + ((right - left) * column) / grid.columns));
  const y = (row) => Math.round(high * (top + ((low - top) * row) / grid.rows));
  context.fillStyle = "rgb(128 128 128 / .85)";
  context.fillRect(0, 0, wide, high);
  context.clearRect(x(0), y(0), x(grid.columns) - x(0), y(grid.rows) - y(0));
  const widest = grid.patches.some((fate) => fate) ? 3 : 1; // where all are kept a fine grid is enough
  const line = Math.max(1, Math.min(widest, (x(1) - x(0)) / 12));
  context.lineWidth = line;
  context.strokeStyle = "rgb(34 197 94)";
  grid.patches.forEach((fate, n) => {
    const column = n % grid.columns, row = Math.floor(n / grid.columns);
    const place = [x(column), y(row), x(column + 1) - x(column), y(row + 1) - y(row)];
    if (fate) {
      context.fillStyle = fate < 0 ? "rgb(0 0 0 / .75)" : colour(fate);
      context.fillRect(...place);
    } else {
      context.strokeRect(place[0] + line / 2, place[1] + line / 2, place[2] - line, place[3] - line);
    }
  });
  canvas.dataset.drawn = grid.patches.length;
}

// Figures of an answer

const bytes = (n) => (n < 1e6 ? `${(n / 1e3).toFixed(1)} kB` : `${(n / 1e6).toFixed(1)} MB`);

function figures(told) {
  const last = told.image_tokens_per_layer.at(-1) ?? 0;
  const again = told.reused_tokens ? `, ${told.reused_tokens} of them cached` : "";
  const rows = [
    ["First token", `${told.first_token_ms.toFixed(0)} ms`],
    ["Speed", `${told.tokens_per_second.toFixed(1)} tokens/s`],
    ["Prompt", `${told.prompt_tokens} tokens${again}`],
    ["Image tokens", told.image_tokens ? `${told.image_tokens} encoded, ${last} in the last layer` : "none"],
    ["Answer", `${told.new_tokens} tokens`],
    ["Cache", bytes(told.cache_bytes) + (told.cache_bytes < told.full_cache_bytes ? ` instead of ${bytes(told.full_cache_bytes)}` : "")],
  ];
  $("figures").tBodies[0].replaceChildren(...rows.map(([name, value]) => {
    const row = document.createElement("tr"), head = element("th", name);
    head.scope = "row";
    row.append(head, element("td", value));
    return row;
  }));
  bars(told.tokens_per_layer, told.kept_per_layer);
  $("told").hidden = false;
}

function bars(entered, left) {
  const svg = $("bars"), most = Math.max(...entered, ...left, 1), make = (tag) => document.createElementNS(svg.namespaceURI, tag);
  svg.setAttribute("viewBox", `0 0 ${entered.length - 0.15} ${most}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-label", entered.map((count, layer) => `layer ${layer}: ${count} read, ${left[layer]} left in the cache`).join("; "));
  const bar = (layer, count, kind) => {
    const rect = make("rect"), title = make("title");
    const place = { x: layer, y: most - count, width: 0.85, height: count, class: kind };
    Object.entries(place).forEach(([key, value]) => rect.setAttribute(key, value));
    title.textContent = `layer ${layer}: ${entered[layer]} read, ${left[layer]} left in the cache`;
    rect.append(title);
    return rect;
  };
  svg.replaceChildren(
    ...entered.map((count, layer) => bar(layer, count, "in")),
    ...left.map((count, layer) => bar(layer, count, "left")));
}

// Asking

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

function busy(abort) {
  running = abort;
  $("send").disabled = Boolean(abort);
  $("stop").disabled = !abort;
  $("answer").setAttribute("aria-busy", Boolean(abort)); // told when it is whole, not piece by piece
}

async function ask(event) {
  event.preventDefault();
  const text = $("question").value.trim();
  if (running || !text) return;
  const content = [{ type: "text", text }];
  if (image) content.unshift({ type: "image_url", image_url: { url: image } });
  const body = {
    model: $("model").value, stream: true, lvlm_details: true, messages: [{ role: "user", content }], ...chosen(),
  };
  const asked = image;
  busy(new AbortController());
  $("answer").textContent = "";
  $("told").hidden = true;
  $("status").textContent = "Reading …";
  mistake("");
  erase();
  let status = "";
  try {
    const answer = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal,
    });
    if (!answer.ok) throw await refused(answer);
    for await (const chunk of events(answer.body)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const choice = chunk.choices[0], piece = choice?.delta.content;
      if (piece) {
        $("status").textContent = "";
        $("answer").append(piece);
      }
      if (choice?.finish_reason === "length") status = "There was no room for more.";
      if (!chunk.lvlm) continue;
      if (!$("answer").textContent) status = "The answer is empty.";
      figures(chunk.lvlm);
      if (chunk.lvlm.images.length && image === asked) overlay(chunk.lvlm.images[0]);
    }
  } catch (error) {
    if (error.name === "AbortError") status = "Stopped.";
    else mistake(error.message);
  } finally {
    busy(null);
    $("status").textContent = status;
  }
}

const over = (event) => $("drop").classList.toggle("over", event.type === "dragover");
// Anywhere: beside the field a browser would leave this page for the image
document.addEventListener("dragover", (e) => { e.preventDefault(); over(e); });
document.addEventListener("dragleave", over);
document.addEventListener("drop", (e) => { e.preventDefault(); over(e); take(e.dataTransfer.files[0]); });
document.addEventListener("paste", (e) => take([...e.clipboardData.files][0]));
$("file").addEventListener("change", (e) => { take(e.target.files[0]); e.target.value = ""; });
$("image").addEventListener("load", (e) => {
  $("frame").style.setProperty("--ratio", e.target.naturalWidth / e.target.naturalHeight);
});
$("image").addEventListener("error", () => {
  image = null;
  shownImage();
  mistake("This browser cannot show that image; give a PNG, a JPEG or a WebP.");
});
new ResizeObserver(draw).observe($("frame"));
$("show").addEventListener("change", draw);
$("clear").addEventListener("click", () => { image = null; shownImage(); $("file").focus(); });
$("ask").addEventListener("submit", ask);
$("question").addEventListener("keydown", (e) => { if (e.key === "Enter" && !e.shiftKey && !e.isComposing) ask(e); });
$("stop").addEventListener("click", () => running?.abort());
$("access").addEventListener("submit", (e) => { e.preventDefault(); loadModels(); });
$("model").addEventListener("change", usual);
Object.keys(ratios).forEach((id) => $(id).addEventListener("input", () => shownRatio(id)));
loadModels();
