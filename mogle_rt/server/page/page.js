"use strict";
/* The page: a mask is an array of class numbers, painted without antialiasing, so that no class appears that nobody painted. */

const $ = (id) => document.getElementById(id);
const stage = $("stage"), canvas = $("mask"), ring = $("ring"), context = canvas.getContext("2d");
const UNDO_BYTES = 64 << 20;                       // of masks that can be gone back to
const MOST_PAST = 60;                              // images of this session that are kept
const SWAPPED = { 4: 5, 5: 4, 6: 7, 7: 6, 8: 9, 9: 8 };   // left and right, where painting is mirrored
const NAMES = { l_eye: "left eye", r_eye: "right eye", l_brow: "left brow", r_brow: "right brow", l_ear: "left ear",
  r_ear: "right ear", u_lip: "upper lip", l_lip: "lower lip", eye_glasses: "glasses", ear_ring: "earring" };

let classes = [], model = null, key = sessionStorage.getItem("key") || "";
let width = 128, height = 128, labels = new Uint8Array(width * height);
let tool = "brush", current = 13, mirrored = false, brush = 8;
let undone = [], done = [];
let view = { x: 0, y: 0, scale: 1 }, cursor = null;
let running = null, past = [], shown = null;       // what is being drawn; images, newest first; the one in the frame
let editing = null;                                // the image that is edited, one of `past`

/* The mask ------------------------------------------------------------------------------------------------------- */

function paintCanvas() {
  if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
  const picture = context.createImageData(width, height);
  const colours = new Uint32Array(classes.map(({ colour: [r, g, b] }) => (255 << 24) | (b << 16) | (g << 8) | r));
  const pixels = new Uint32Array(picture.data.buffer);
  for (let i = 0; i < labels.length; i++) pixels[i] = colours[labels[i]];
  context.putImageData(picture, 0, 0);
  if (editing) tellEdit();
}

function remember() {
  done.push({ width, height, labels: labels.slice() });
  let bytes = 0;
  for (let i = done.length - 1; i >= 0; i--) if ((bytes += done[i].labels.length) > UNDO_BYTES) { done.splice(0, i); break; }
  undone = [];
  showUndo();
}

function showUndo() { $("undo").disabled = !done.length; $("redo").disabled = !undone.length; }

function step(from, to) {
  if (!from.length) return;
  to.push({ width, height, labels });
  const other = from.pop(), resized = other.width !== width || other.height !== height;
  ({ width, height, labels } = other);
  paintCanvas(); showUndo();
  if (resized) fit();
}

function setMask(newLabels, newWidth, newHeight, note = "") {
  if (labels.some(Boolean)) remember();
  labels = newLabels; width = newWidth; height = newHeight;
  $("mask-error").textContent = ""; $("mask-note").textContent = note;
  $("brush-size").max = Math.max(32, Math.round(Math.max(width, height) / 2));
  paintCanvas(); fit();
}

/* Every pixel whose centre lies within the brush. Centres alone decide: edges are hard. */
function stamp(cx, cy, value) {
  const r = brush / 2, r2 = r * r;
  for (let y = Math.max(0, Math.floor(cy - r)); y <= Math.min(height - 1, Math.ceil(cy + r)); y++)
    for (let x = Math.max(0, Math.floor(cx - r)); x <= Math.min(width - 1, Math.ceil(cx + r)); x++) {
      const dx = x + 0.5 - cx, dy = y + 0.5 - cy;
      if (dx * dx + dy * dy <= r2 || (x === Math.floor(cx) && y === Math.floor(cy))) labels[y * width + x] = value;
    }
}

function stroke(a, b) {
  const value = tool === "eraser" ? 0 : current, steps = Math.max(1, Math.ceil(Math.hypot(b.x - a.x, b.y - a.y) * 2));
  for (let i = 0; i <= steps; i++) {
    const x = a.x + ((b.x - a.x) * i) / steps, y = a.y + ((b.y - a.y) * i) / steps;
    stamp(x, y, value);
    if (mirrored) stamp(width - x, y, SWAPPED[value] ?? value);
  }
  paintCanvas();
}

function fillFrom(x, y, value) {
  const start = Math.floor(y) * width + Math.floor(x), from = labels[start];
  if (from === value) return;
  const open = [start];
  labels[start] = value;
  while (open.length) {
    const i = open.pop(), column = i % width;
    for (const j of [column ? i - 1 : -1, column < width - 1 ? i + 1 : -1, i - width, i + width])
      if (j >= 0 && j < labels.length && labels[j] === from) { labels[j] = value; open.push(j); }
  }
}

function fill(point) {
  remember();
  fillFrom(point.x, point.y, current);
  if (mirrored) fillFrom(Math.max(0, width - 1 - Math.floor(point.x)), point.y, SWAPPED[current] ?? current);
  paintCanvas();
}

const inside = ({ x, y }) => x >= 0 && y >= 0 && x < width && y < height;
const labelAt = ({ x, y }) => labels[Math.floor(y) * width + Math.floor(x)];

/* A face to start from, in the proportions of the examples: ellipses, in units of 1/128 of the side. */
function skeleton(side) {
  const made = new Uint8Array(side * side), unit = side / 128;
  const ellipse = (value, cx, cy, rx, ry, from = 0, to = 128) => {
    for (let y = 0; y < side; y++) for (let x = 0; x < side; x++) {
      const u = (x + 0.5) / unit, v = (y + 0.5) / unit;
      if (((u - cx) / rx) ** 2 + ((v - cy) / ry) ** 2 <= 1 && v >= from && v <= to) made[y * side + x] = value;
    }
  };
  ellipse(13, 64, 55, 37, 41);                                      // hair
  ellipse(18, 64, 140, 58, 29);                                     // cloth
  ellipse(17, 64, 100, 17, 20);                                     // neck
  ellipse(8, 95, 70, 5, 10); ellipse(9, 33, 70, 5, 10);             // ears
  ellipse(1, 64, 68, 31, 36, 36);                                   // skin
  ellipse(13, 64, 36, 27, 9);                                       // the hair's edge
  for (const [cx, brow, eye] of [[77, 6, 4], [51, 7, 5]]) { ellipse(brow, cx, 50, 8.5, 2.6); ellipse(eye, cx, 60, 6.5, 3.2); }
  ellipse(2, 64, 68, 6, 9.5);                                       // nose
  ellipse(11, 64, 85.5, 11, 4, 0, 86); ellipse(12, 64, 86, 10, 5, 86);   // lips
  return made;
}

/* The view ------------------------------------------------------------------------------------------------------- */

function place() {
  canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
  canvas.style.transform = `translate(${view.x}px, ${view.y}px) scale(${view.scale})`;
  $("zoom").textContent = `${Math.round(view.scale * 100)} %`;
  showRing();
}

function fit() {
  const box = stage.getBoundingClientRect();
  view.scale = Math.min((box.width - 16) / width, (box.height - 16) / height);
  if (view.scale > 1) view.scale = Math.floor(view.scale * 4) / 4;
  view.x = (box.width - width * view.scale) / 2; view.y = (box.height - height * view.scale) / 2;
  place();
}

function zoomAt(factor, px, py) {
  const scale = Math.min(64, Math.max(0.1, view.scale * factor)), ratio = scale / view.scale;
  view.x = px - (px - view.x) * ratio; view.y = py - (py - view.y) * ratio; view.scale = scale;
  place();
}

function zoomMiddle(factor) { zoomAt(factor, stage.clientWidth / 2, stage.clientHeight / 2); }

function pointOf(event) {
  const box = stage.getBoundingClientRect(), px = event.clientX - box.left - stage.clientLeft, py = event.clientY - box.top - stage.clientTop;
  return { px, py, x: (px - view.x) / view.scale, y: (py - view.y) / view.scale };
}

function showRing() {
  if (!cursor || tool === "move" || tool === "pick" || tool === "fill") { ring.style.visibility = "hidden"; }
  else {
    const size = Math.max(3, brush * view.scale);
    ring.style.visibility = "visible"; ring.style.width = ring.style.height = `${size}px`;
    ring.style.transform = `translate(${view.x + cursor.x * view.scale - size / 2}px, ${view.y + cursor.y * view.scale - size / 2}px)`;
  }
  const at = cursor && inside(cursor) && classes.length ? classes[labelAt(cursor)].shown : "";
  $("where").textContent = at ? `${Math.floor(cursor.x)}, ${Math.floor(cursor.y)}: ${at}` : "";
}

const pointers = new Map();
let last = null, pinch = null;

stage.addEventListener("pointerdown", (event) => {
  if (event.target.closest("button")) return;
  stage.setPointerCapture(event.pointerId);
  stage.focus({ preventScroll: true });
  event.preventDefault();
  const point = pointOf(event);
  pointers.set(event.pointerId, point);
  cursor = point;
  if (pointers.size === 2) {
    // A second finger: what the first began was no stroke.
    if (last && last.began) step(done, []);
    last = null; pinch = [...pointers.values()]; return;
  }
  if (pointers.size > 2) return;
  if (event.button === 2 || event.altKey || tool === "pick") { if (inside(point)) choose(labelAt(point)); return; }
  if (event.button === 1 || tool === "move") { last = { move: point }; return; }
  if (tool === "fill") { if (inside(point)) fill(point); return; }
  remember();
  stroke(point, point);
  last = { point, began: true };
  showRing();
});

stage.addEventListener("pointermove", (event) => {
  const point = pointOf(event);
  cursor = point;
  if (pointers.has(event.pointerId)) pointers.set(event.pointerId, point);
  if (pinch && pointers.size === 2) {
    const [a, b] = pinch, [c, d] = [...pointers.values()];
    const before = Math.hypot(a.px - b.px, a.py - b.py) || 1, after = Math.hypot(c.px - d.px, c.py - d.py) || 1;
    zoomAt(after / before, (c.px + d.px) / 2, (c.py + d.py) / 2);
    view.x += (c.px + d.px - a.px - b.px) / 2; view.y += (c.py + d.py - a.py - b.py) / 2;
    pinch = [c, d]; place(); return;
  }
  if (last && last.move) { view.x += point.px - last.move.px; view.y += point.py - last.move.py; last.move = point; place(); return; }
  if (last && last.point) {
    for (const each of event.getCoalescedEvents?.() ?? [event]) { const to = pointOf(each); stroke(last.point, to); last.point = to; }
    stroke(last.point, point); last.point = point;
  }
  showRing();
});

function lift(event) {
  pointers.delete(event.pointerId);
  if (pointers.size < 2) pinch = null;
  if (!pointers.size) last = null;
}
stage.addEventListener("pointerup", lift);
stage.addEventListener("pointercancel", lift);
stage.addEventListener("pointerleave", (event) => { if (!pointers.size && document.activeElement !== stage) { cursor = null; } if (event.pointerType === "touch") cursor = null; showRing(); });
stage.addEventListener("contextmenu", (event) => event.preventDefault());
stage.addEventListener("wheel", (event) => {
  event.preventDefault();
  const { px, py } = pointOf(event);
  zoomAt(Math.exp(-event.deltaY / (event.ctrlKey ? 100 : 400)), px, py);
}, { passive: false });
addEventListener("resize", fit);

/* Tools ---------------------------------------------------------------------------------------------------------- */

function choose(number) {
  current = number;
  for (const button of $("palette").children) {
    const chosen = Number(button.dataset.class) === number;
    button.setAttribute("aria-checked", chosen); button.tabIndex = chosen ? 0 : -1;
    if (chosen) button.scrollIntoView?.({ block: "nearest", inline: "nearest" });
  }
  if (tool === "eraser" || tool === "pick" || tool === "move") take("brush");
}

function take(name) {
  tool = name; stage.dataset.tool = name;
  for (const button of document.querySelectorAll("[data-tool][role=radio]")) {
    button.setAttribute("aria-checked", button.dataset.tool === name); button.tabIndex = button.dataset.tool === name ? 0 : -1;
  }
  showRing();
}

function resizeBrush(size) {
  brush = Math.min(Number($("brush-size").max), Math.max(1, Math.round(size)));
  $("brush-size").value = brush; $("brush-size-out").value = brush;
  showRing();
}

function toggleMirror() { mirrored = !mirrored; $("mirror").setAttribute("aria-pressed", mirrored); }

function between(group, event) {   // arrow keys within a group of choices
  const all = [...group.querySelectorAll("[role=radio]")], at = all.indexOf(document.activeElement);
  const by = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
  if (at < 0 || !by) return;
  event.preventDefault(); event.stopPropagation();
  const next = all[(at + by + all.length) % all.length];
  next.click(); next.focus();
}
for (const group of document.querySelectorAll("[role=radiogroup]")) group.addEventListener("keydown", (event) => between(group, event));
for (const button of document.querySelectorAll("[data-tool][role=radio]")) button.addEventListener("click", () => take(button.dataset.tool));
$("brush-size").addEventListener("input", (event) => resizeBrush(Number(event.target.value)));
$("mirror").addEventListener("click", toggleMirror);
$("undo").addEventListener("click", () => step(done, undone));
$("redo").addEventListener("click", () => step(undone, done));
$("zoom-in").addEventListener("click", () => zoomMiddle(1.5));
$("zoom-out").addEventListener("click", () => zoomMiddle(1 / 1.5));
$("zoom-fit").addEventListener("click", fit);
$("help-button").addEventListener("click", () => $("help").showModal());

addEventListener("keydown", (event) => {
  const command = event.ctrlKey || event.metaKey, name = event.key.toLowerCase();
  if (command && event.key === "Enter") { event.preventDefault(); draw(); return; }
  if (event.target.closest("input:not([type=range]), textarea, select, dialog")) return;
  if (command && name === "z") { event.preventDefault(); event.shiftKey ? step(undone, done) : step(done, undone); return; }
  if (command && name === "y") { event.preventDefault(); step(undone, done); return; }
  if (command || event.altKey) return;
  const tools = { b: "brush", e: "eraser", f: "fill", i: "pick", h: "move" };
  if (tools[name]) take(tools[name]);
  else if (event.key === "[") resizeBrush(brush - Math.max(1, brush / 8));
  else if (event.key === "]") resizeBrush(brush + Math.max(1, brush / 8));
  else if (name === "m") toggleMirror();
  else if (event.key === "+" || event.key === "=") zoomMiddle(1.5);
  else if (event.key === "-") zoomMiddle(1 / 1.5);
  else if (event.key === "0") fit();
  else if (event.key === "?") $("help").showModal();
  else if (event.target === stage && (event.key.startsWith("Arrow") || event.key === " ")) {
    const by = event.shiftKey ? 8 : 1, before = cursor ?? { x: width / 2, y: height / 2 };
    const [dx, dy] = { ArrowLeft: [-by, 0], ArrowRight: [by, 0], ArrowUp: [0, -by], ArrowDown: [0, by] }[event.key] ?? [0, 0];
    cursor = { x: Math.min(width - 0.5, Math.max(0.5, before.x + dx)), y: Math.min(height - 0.5, Math.max(0.5, before.y + dy)) };
    if (event.key === " ") { if (tool === "fill") fill(cursor); else if (tool === "pick") choose(labelAt(cursor)); else { remember(); stroke(cursor, cursor); } }
    showRing();
  } else return;
  event.preventDefault();
});

/* Files ---------------------------------------------------------------------------------------------------------- */

const CRCS = Uint32Array.from({ length: 256 }, (_, n) => { for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1; return n; });

/* A PNG of class numbers: grey, or with the palette of the classes' colours. A canvas can write neither. */
async function pngOf(numbers, w, h, withPalette) {
  const rows = new Uint8Array((w + 1) * h);
  for (let y = 0; y < h; y++) rows.set(numbers.subarray(y * w, (y + 1) * w), y * (w + 1) + 1);
  const packed = new Blob([rows]).stream().pipeThrough(new CompressionStream("deflate"));
  const data = new Uint8Array(await new Response(packed).arrayBuffer());
  const chunk = (name, body) => {
    const made = new Uint8Array(body.length + 12), fields = new DataView(made.buffer);
    fields.setUint32(0, body.length);
    made.set([...name].map((c) => c.charCodeAt(0)), 4); made.set(body, 8);
    let crc = ~0;
    for (let i = 4; i < made.length - 4; i++) crc = CRCS[(crc ^ made[i]) & 255] ^ (crc >>> 8);
    fields.setUint32(made.length - 4, ~crc);
    return made;
  };
  const head = new Uint8Array(13), sizes = new DataView(head.buffer);
  sizes.setUint32(0, w); sizes.setUint32(4, h);
  head.set([8, withPalette ? 3 : 0, 0, 0, 0], 8);
  const parts = [new Uint8Array([137, 80, 78, 71, 13, 10, 26, 10]), chunk("IHDR", head)];
  if (withPalette) parts.push(chunk("PLTE", new Uint8Array(classes.flatMap(({ colour }) => colour))));
  return new Blob([...parts, chunk("IDAT", data), chunk("IEND", new Uint8Array())], { type: "image/png" });
}

function npyOf(numbers, w, h) {
  let header = `{'descr': '|u1', 'fortran_order': False, 'shape': (${h}, ${w}), }`;
  header = header.padEnd(Math.ceil((header.length + 11) / 64) * 64 - 11) + "\n";
  const start = new Uint8Array([0x93, 78, 85, 77, 80, 89, 1, 0, header.length & 255, header.length >> 8]);
  return new Blob([start, header, numbers], { type: "application/octet-stream" });
}

function offer(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob); link.download = name; link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

$("save").addEventListener("change", async (event) => {
  const kind = event.target.value;
  event.target.value = "";
  if (kind === "npy") offer(npyOf(labels, width, height), "mask.npy");
  else if (kind === "colour") canvas.toBlob((blob) => offer(blob, "mask-colours.png"));
  else offer(await pngOf(labels, width, height, kind === "palette"), kind === "palette" ? "mask.png" : "mask-grey.png");
});

async function openFiles(files) {
  if (!files.length) return;
  const form = new FormData();
  for (const file of files) form.append("semantic_mask", file, file.name);
  $("mask-error").textContent = ""; $("mask-note").textContent = "reading the mask …";
  try {
    const read = await (await ask("/v1/masks", { method: "POST", body: form })).json();
    setMask(bytesOf(read.labels), read.width, read.height, read.warnings.map(sentence).join(" "));
  } catch (error) { $("mask-note").textContent = ""; $("mask-error").textContent = error.message; }
}
$("open").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", async (event) => { await openFiles([...event.target.files]); event.target.value = ""; });
stage.addEventListener("dragover", (event) => { event.preventDefault(); stage.classList.add("dropping"); });
stage.addEventListener("dragleave", () => stage.classList.remove("dropping"));
stage.addEventListener("drop", (event) => { event.preventDefault(); stage.classList.remove("dropping"); openFiles([...event.dataTransfer.files]); });

/* The server ----------------------------------------------------------------------------------------------------- */

const sentence = (message) => message[0].toUpperCase() + message.slice(1) + (message.endsWith(".") ? "" : ".");
const bytesOf = (b64) => Uint8Array.from(atob(b64), (c) => c.charCodeAt(0));
const blobOf = (b64, kind) => new Blob([bytesOf(b64)], { type: kind });

async function ask(path, options = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  let answer;
  try { answer = await fetch(path, { ...options, headers }); }
  catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server doesn't answer. Is it still running?");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) { $("key-form").hidden = false; $("key").focus(); }
  let message = `the server answered ${answer.status}`;
  try { message = (await answer.json()).error.message; } catch { /* not the server's own answer */ }
  throw new Error(sentence(message));
}

async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done: ended } = await reader.read();
    if (ended) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield JSON.parse(data.slice(6));
    }
  }
}

function nextSeed() {
  const mode = $("seed-mode").value, seed = $("seed");
  if (mode === "random") seed.value = Math.floor(Math.random() * 1e6);
}

async function draw() {
  if (running || !model) return;
  $("draw-error").textContent = ""; $("result-warning").textContent = ""; $("image-error").textContent = "";
  for (const field of ["seed", "steps", "condition", "guidance", ...(editing ? ["margin"] : [])]) {
    if (!$(field).checkValidity()) { $("draw-error").textContent = `${$(field).labels[0].textContent}: ${$(field).validationMessage}`; $(field).focus(); return; }
  }
  const missing = editing && missingOfEdit();
  if (missing) { $("draw-error").textContent = missing; return; }
  nextSeed();
  const settings = { prompt: $("prompt").value.trim(), seed: Number($("seed").value), steps: Number($("steps").value),
    guidance: Number($("guidance").value), condition: Number($("condition").value), size: $("size").value };
  const mask = { width, height, labels: labels.slice() }, edit = editing && editOptions(), control = new AbortController();
  running = { control, settings, mask, edit };
  busy(true, "asking the server …");
  try {
    const form = new FormData();
    const fields = { prompt: settings.prompt, seed: settings.seed, num_inference_steps: settings.steps,
      condition_scale: settings.condition, stream: "true", partial_images: 8 };
    if (model.guidance) fields.guidance_scale = settings.guidance;
    if (!edit) fields.size = settings.size;
    for (const [name, value] of Object.entries(fields)) form.append(name, value);
    if (edit) await addEdit(form, edit, mask);
    else form.append("semantic_mask", await filePng(mask), "mask.png");
    const path = edit ? "/v1/images/edits" : "/v1/images/generations";
    const answer = await ask(path, { method: "POST", body: form, signal: control.signal });
    for await (const event of eventsOf(answer)) follow(event);
    if (running && !running.drawn) throw new Error("The server ended before the image was drawn.");
    if ($("seed-mode").value === "next") $("seed").value = settings.seed + 1;
  } catch (error) {
    if (error.name !== "AbortError") $("draw-error").textContent = error.message;
    $("status").textContent = error.name === "AbortError" ? "stopped" : "";
    showPast(shown);
  } finally { running = null; busy(false); }
}

const filePng = (mask) => pngOf(mask.labels, mask.width, mask.height, true);

function follow(event) {
  const kind = event.type.split(".").pop();   // the same for images and for edits
  if (kind === "queued")
    $("status").textContent = event.ahead ? `waiting: ${event.ahead} ${event.ahead === 1 ? "image is" : "images are"} ahead` : "starting …";
  else if (kind === "progress") {
    $("progress").value = event.step / event.steps;
    $("status").textContent = event.step < event.steps ? `step ${event.step} of ${event.steps}` : "decoding …";
  } else if (kind === "partial_image") showPreview(blobOf(event.b64_json, "image/jpeg"));
  else if (kind === "completed") {
    running.drawn = true;
    const seconds = (performance.now() - running.started) / 1000, file = blobOf(event.b64_json, "image/png");
    const { settings, mask, edit } = running;
    $("status").textContent = `drawn in ${seconds.toFixed(1)} s`;
    keep({ file, settings: { ...settings, seed: event.seed }, mask, edit, size: event.size, warnings: event.warnings });
    if (edit) comparing(true);
  } else if (kind === "error") throw new Error(sentence(event.error.message));
}

function busy(now, text) {
  $("draw").disabled = now; $("cancel").hidden = !now; $("progress").classList.toggle("busy", now);
  $("picture").setAttribute("aria-busy", now);
  if (now) { $("progress").value = 0; $("status").textContent = text; running.started = performance.now(); }
}

$("draw").addEventListener("click", draw);
$("cancel").addEventListener("click", () => running?.control.abort());

/* Images --------------------------------------------------------------------------------------------------------- */

let previewUrl = null;
function showPreview(blob) {
  if (previewUrl) URL.revokeObjectURL(previewUrl);
  previewUrl = URL.createObjectURL(blob);
  comparing(false);
  $("picture").classList.remove("empty");
  $("result").src = previewUrl; $("result").hidden = false; $("result").className = "preview"; $("result").alt = "a preview";
  $("tag").textContent = "preview"; $("tag").hidden = false;
}

/* An image: its file, what it was drawn with, its mask, and for an edit what was edited and how. */
function keep(image) {
  image.url = URL.createObjectURL(image.file);
  past.unshift(image);
  for (const old of past.splice(MOST_PAST)) if (old !== editing && !past.some((one) => one.edit?.source === old)) URL.revokeObjectURL(old.url);
  showPast(image);
}

function showPast(image) {
  $("tag").hidden = true;
  comparing(false);
  shown = image;
  $("picture").classList.toggle("empty", !image); $("result").hidden = !image;
  for (const button of $("result-bar").querySelectorAll(".of-image")) button.hidden = !image;
  if (!image) return;
  $("result").src = image.url; $("result").className = ""; $("result").alt = image.settings.prompt || "a face drawn from the mask alone";
  const { settings } = image, how = `seed ${settings.seed}, ${settings.steps} steps`;
  $("result-note").textContent = `${image.size.replace("x", " × ")}, ${image.opened ? `opened: ${image.opened}` : how}`;
  $("result-warning").textContent = image.warnings.map(sentence).join(" ");
  $("download").href = image.url; $("download").download = image.opened || `face_${settings.seed}${image.edit ? "_edited" : ""}.png`;
  $("compare").hidden = !beforeOf(image);
  $("history-panel").hidden = false;
  $("history").replaceChildren(...past.map((one) => {
    const button = document.createElement("button"), thumb = document.createElement("img");
    button.type = "button"; button.className = "past"; thumb.src = one.url; thumb.alt = `seed ${one.settings.seed}`;
    button.title = `${one.settings.prompt || "no prompt"}\nseed ${one.settings.seed}, ${one.settings.steps} steps, ${one.size}`;
    if (one === image) button.setAttribute("aria-current", "true");
    button.append(thumb);
    const sort = one.opened ? "opened" : one.edit ? "edit" : "";
    if (sort) button.append(Object.assign(document.createElement("span"), { textContent: sort }));
    button.addEventListener("click", () => { showPast(one); if (one.edit) comparing(true); });
    return button;
  }));
}

/* What an image is compared with: what it is an edit of, or the image before it. */
const beforeOf = (image) => image.edit?.source ?? past.slice(past.indexOf(image) + 1).find((one) => one.size === image.size);

function comparing(on) {
  const other = on && shown ? beforeOf(shown) : null;
  for (const name of ["before", "slider", "divider"]) $(name).hidden = !other;
  $("compare").setAttribute("aria-pressed", Boolean(other));
  if (other) { $("before").src = other.url; slide(); } else $("result").style.clipPath = "";
  $("tag").hidden = !other;
  if (other) $("tag").textContent = "before | after";
}

/* The image may be letterboxed within the frame, so the divider follows the frame and both images share it. */
function slide() {
  const share = Number($("slider").value);
  $("before").style.clipPath = `inset(0 ${100 - share}% 0 0)`;
  $("result").style.clipPath = `inset(0 0 0 ${share}%)`;
  $("divider").style.left = `${share}%`;
}
$("slider").addEventListener("input", slide);
$("compare").addEventListener("click", () => comparing($("compare").getAttribute("aria-pressed") !== "true"));
$("restore").addEventListener("click", () => {
  const { edit, mask } = shown;
  if (edit) beginEdit(edit.source, edit); else endEdit();
  if (mask) setMask(mask.labels.slice(), mask.width, mask.height);
  putSettings(shown.settings);
});

function putSettings(settings) {
  $("prompt").value = settings.prompt; $("seed").value = settings.seed; $("seed-mode").value = "fixed"; $("steps").value = settings.steps;
  $("guidance").value = settings.guidance; $("condition").value = settings.condition; $("size").value = settings.size;
}

/* Edits ---------------------------------------------------------------------------------------------------------- */

const ALL = "all";                                 // of the image is drawn anew, beside the names of classes

function beginEdit(image, options = { strength: 1, anew: [], kept: [], margin: "" }) {
  editing = image;
  $("edit-panel").hidden = false; $("edit-image").src = image.url; $("draw").textContent = "Draw the edit"; $("size").disabled = true;
  $("strength").value = options.strength; $("margin").value = options.margin; $("draw-error").textContent = "";
  $("edit-more").open = Boolean(options.kept.length || options.margin);
  tellStrength();
  const there = image.mask ? new Set(image.mask.labels) : new Set(classes.keys());
  const named = classes.map((one, number) => [one.name, one.shown, number]).filter(([, , number]) => there.has(number));
  chips("anew", [[ALL, "everything"], ...named], options.anew);
  chips("kept", named, options.kept);
  if (image.mask) setMask(image.mask.labels.slice(), image.mask.width, image.mask.height, "What you paint now is drawn anew in the image.");
  else tellEdit();
  $("paint-panel").scrollIntoView({ block: "nearest" });     // on a phone the mask is far from the image
}

function endEdit() {
  editing = null;
  $("edit-panel").hidden = true; $("mask-note").textContent = ""; $("draw").textContent = "Draw"; $("size").disabled = false; $("draw-error").textContent = "";
}

function chips(id, names, chosen) {
  $(id).replaceChildren(...names.map(([name, text]) => {
    const chip = document.createElement("button");
    chip.type = "button"; chip.dataset.name = name; chip.textContent = text; chip.setAttribute("aria-pressed", chosen.includes(name));
    chip.addEventListener("click", () => {
      const on = chip.getAttribute("aria-pressed") !== "true";
      chip.setAttribute("aria-pressed", on);
      if (id === "anew" && on) for (const other of $(id).children)   // everything is more than any class
        if ((name === ALL) !== (other.dataset.name === ALL)) other.setAttribute("aria-pressed", false);
      if (name === ALL) { $("strength").value = on ? 0.6 : 1; tellStrength(); }
      tellEdit();
    });
    return chip;
  }));
}

const chosen = (id) => [...$(id).children].filter((chip) => chip.getAttribute("aria-pressed") === "true").map((chip) => chip.dataset.name);

function editOptions() {
  return { source: editing, strength: Number($("strength").value), anew: chosen("anew"), kept: chosen("kept"), margin: $("margin").value };
}

/* The number of pixels that differ from the image's own mask, or null where the two have no pixels in common. */
function painted() {
  const mask = editing.mask;
  if (!mask || mask.width !== width || mask.height !== height) return null;
  let count = 0;
  for (let i = 0; i < labels.length; i++) if (labels[i] !== mask.labels[i]) count++;
  return count;
}

function tellEdit() {
  const names = chosen("anew"), count = painted(), shownNames = names.map((name) => classes.find((one) => one.name === name)?.shown);
  const changed = count === null ? "what differs from the old mask" : count ? `${count.toLocaleString("en")} painted ${count === 1 ? "pixel" : "pixels"}` : "";
  $("edit-own").hidden = Boolean(editing.mask);
  if (names.includes(ALL)) $("edit-note").textContent = "All of the image is drawn anew, starting from what it is.";
  else if (!editing.mask) $("edit-note").textContent = "It holds no mask. Open or paint the mask that belongs to it, and press the button below.";
  else {
    const parts = [changed, ...shownNames].filter(Boolean);
    $("edit-note").textContent = parts.length ? `Drawn anew: ${parts.join(", ")}. The rest stays.` : "Paint on the mask, or choose what is drawn anew.";
  }
}

/* What has to be done before an edit can be drawn, or null. */
function missingOfEdit() {
  const names = chosen("anew");
  if (names.includes(ALL)) return null;
  if (!editing.mask) return "The image holds no mask: open or paint the one that belongs to it, and say so above.";
  return painted() === 0 && !names.length ? "Nothing would change: paint on the mask, or choose what is drawn anew." : null;
}

async function addEdit(form, edit, mask) {
  const all = edit.anew.includes(ALL);
  form.append("image", edit.source.file, "image");
  form.append("strength", edit.strength);
  form.append("semantic_mask_before", await filePng(all ? mask : edit.source.mask), "before.png");
  if (all) return;
  form.append("semantic_mask", await filePng(mask), "after.png");
  form.append("regions", edit.anew.join(",")); form.append("keep", edit.kept.join(","));
  if (edit.margin !== "") form.append("margin", edit.margin);
}

/* Open an image with what it was drawn with, as far as it says so, and edit it. */
async function openImage(file) {
  if (!file) return;
  $("image-error").textContent = "";
  try {
    const form = new FormData();
    form.append("image", file, file.name);
    const told = await (await ask("/v1/images/settings", { method: "POST", body: form })).json();
    const picture = await createImageBitmap(file);
    const or = (value, id) => value ?? Number($(id).value);
    const settings = { prompt: told.prompt ?? "", seed: or(told.seed, "seed"), steps: or(told.num_inference_steps, "steps"),
      guidance: or(told.guidance_scale, "guidance"), condition: or(told.condition_scale, "condition"), size: "auto" };
    const mask = told.mask && { width: told.mask.width, height: told.mask.height, labels: bytesOf(told.mask.labels) };
    const warnings = told.own_model ? [] : ["this image was drawn by another model"];
    keep({ file, settings, mask, edit: null, size: `${picture.width}x${picture.height}`, warnings, opened: file.name });
    beginEdit(shown);
    if (told.mask) putSettings(settings);
  } catch (error) {
    $("image-error").textContent = error instanceof DOMException ? "This image can't be read." : error.message;
  }
}

function tellStrength() { $("strength-out").value = `${Math.round($("strength").value * 100)} %`; }
$("strength").addEventListener("input", tellStrength);
$("edit").addEventListener("click", () => { beginEdit(shown); putSettings(shown.settings); });
$("edit-stop").addEventListener("click", endEdit);
$("edit-own").addEventListener("click", () => { editing.mask = { width, height, labels: labels.slice() }; beginEdit(editing, editOptions()); });
$("open-image").addEventListener("click", () => $("image-file").click());
$("image-file").addEventListener("change", async (event) => { await openImage(event.target.files[0]); event.target.value = ""; });
$("picture").addEventListener("dragover", (event) => { event.preventDefault(); $("picture").classList.add("dropping"); });
$("picture").addEventListener("dragleave", () => $("picture").classList.remove("dropping"));
$("picture").addEventListener("drop", (event) => { event.preventDefault(); $("picture").classList.remove("dropping"); openImage(event.dataTransfer.files[0]); });

/* The start ------------------------------------------------------------------------------------------------------ */

const THEMES = ["auto", "light", "dark"];
function setTheme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme; else document.documentElement.dataset.theme = name;
  $("theme").textContent = `Theme: ${name}`;
  try { localStorage.setItem("theme", name); } catch { /* not kept */ }
}
$("theme").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme ?? "auto";
  setTheme(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
});
try { setTheme(THEMES.includes(localStorage.getItem("theme")) ? localStorage.getItem("theme") : "auto"); } catch { setTheme("auto"); }

$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  key = $("key").value.trim(); $("key-error").textContent = "";
  if (await begin()) { sessionStorage.setItem("key", key); $("key-form").hidden = true; }
  else $("key-error").textContent = "The server doesn't know this key.";
});

function addStart(name, picture, use) {
  const button = document.createElement("button");
  button.type = "button"; button.className = "start"; button.append(picture, name);
  button.addEventListener("click", use);
  $("examples").append(button);
}

function pictureOf(numbers, side) {
  const small = document.createElement("canvas");
  small.width = small.height = side;
  const picture = small.getContext("2d").createImageData(side, side);
  numbers.forEach((c, i) => picture.data.set([...classes[c].colour, 255], 4 * i));
  small.getContext("2d").putImageData(picture, 0, 0);
  return small;
}

async function useExample(name, prompt) {
  try {
    const file = await (await ask(`/examples/${name}.png`)).blob();
    await openFiles([new File([file], `${name}.png`)]);
    $("prompt").value = prompt;
  } catch (error) { $("mask-error").textContent = error.message; }
}

async function begin() {
  let settings;
  try { settings = await (await ask("/settings.json")).json(); }
  catch (error) { if ($("key-form").hidden) $("draw-error").textContent = error.message; return false; }
  model = settings.model;
  classes = settings.classes.map((one) => ({ ...one, shown: NAMES[one.name] ?? one.name.replace("_", " ") }));
  $("model").textContent = `model ${model.id}`;
  $("steps").max = model.max_steps; $("guidance-field").hidden = !model.guidance; $("prompt").disabled = !model.prompts;
  $("palette").replaceChildren(...classes.map((one, number) => {
    const button = document.createElement("button"), swatch = document.createElement("span");
    button.type = "button"; button.className = "class"; button.setAttribute("role", "radio"); button.dataset.class = number;
    swatch.className = "swatch"; swatch.style.background = `rgb(${one.colour})`;
    button.append(swatch, one.shown);
    button.addEventListener("click", () => choose(number));
    return button;
  }));
  const side = model.default_side;
  for (const [w, h] of [[1, 1], [3, 4], [4, 3], [2, 2]]) {
    const [sw, sh] = [w, h].map((part) => Math.round((w === h ? part : part / Math.sqrt(12)) * side / 16) * 16);
    if (sw * sh <= model.max_pixels) $("size").append(new Option(`${sw} × ${sh}`, `${sw}x${sh}`));
  }
  $("examples").replaceChildren();
  addStart("face", pictureOf(skeleton(64), 64), () => setMask(skeleton(side), side, side));
  addStart("blank", pictureOf(new Uint8Array(64 * 64), 64), () => setMask(new Uint8Array(side * side), side, side));
  for (const { name, prompt } of settings.examples) {
    const picture = document.createElement("img");
    picture.alt = ""; picture.loading = "lazy";
    ask(`/examples/${name}.png`).then((answer) => answer.blob()).then((blob) => { picture.src = URL.createObjectURL(blob); }).catch(() => {});
    addStart(name, picture, () => useExample(name, prompt));
  }
  choose(13); take("brush");
  setMask(skeleton(side), side, side);
  resizeBrush(Math.max(2, side / 16));
  document.documentElement.dataset.ready = "true";
  return true;
}
showPast(null);
begin();
