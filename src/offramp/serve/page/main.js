// The page: a conversation, a meter, and the settings that the next answer is made with.

import { alternatives, answer, menu } from "./api.js";
import { AnswerView, inWords } from "./answers.js";

const $ = (id) => document.getElementById(id);
const STARTS = ["Why is the sky blue?", "List three uses of vinegar in the house.", "Write one sentence about the sea."];
const FILLS = {
  full: "No exits: every token runs through all blocks.",
  verify: "Exits draft, and full depth decides: the same answer, sooner.",
  project: "A token that leaves counts. What skipped blocks remember is computed from the state at the exit.",
  copy: "A token that leaves counts. Skipped blocks get the keys and values of the last block that ran.",
  freeze: "A token that leaves counts. The Mamba states of skipped blocks stay as they were.",
  defer: "A token that leaves counts. Skipped blocks run later, together with the next token that goes deep.",
};

const facts = { blocks: 1, model: "", points: [] };
const messages = [];
let running = null; // the AbortController of the answer on its way
let speedOfFull = null;

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function decides() {
  return !["full", "verify"].includes($("fill").value);
}

function way(fill) {
  const chosen = fill ?? $("fill").value;
  return { fill: chosen, ids: true, ...(!fill && decides() && facts.points.length ? { point: Number($("point").value) } : {}) };
}

function showSettings() {
  $("fill-help").textContent = FILLS[$("fill").value] ?? "";
  $("points").hidden = !decides() || !facts.points.length;
  const point = facts.points[Number($("point").value)];
  if (!point) return;
  const { fill, max_tokens: longest } = facts.tested;
  const alike = fill === $("fill").value && Number($("temperature").value) === 0 && Number($("length").value) <= longest;
  const passed = !point.passed ? "did not pass its test" : alike ? "passed its test" : "passed its test, but not used in this way";
  const words = `saves ${percent(point.flops_saved)} of FLOPs, answers lose ${percent(point.loss)} on average; ${passed}`;
  $("point-value").textContent = words;
  $("point").setAttribute("aria-valuetext", words);
}

function percent(share) {
  return `${(100 * share).toFixed(1)}%`;
}

function meter(values) {
  for (const [name, value] of Object.entries(values)) document.querySelector(`[data-meter="${name}"]`).textContent = value;
}

let asking = null;
async function tell(view, index) {
  const token = view.tokens[index];
  $("token").textContent = inWords(token, facts.blocks);
  if (!view.prompt) return;
  asking?.abort();
  asking = new AbortController();
  const { signal } = asking;
  await new Promise((done) => setTimeout(done, 250)); // a pointer that only passes asks for nothing
  if (signal.aborted) return;
  try {
    const found = await alternatives(facts.model, [...view.prompt, ...view.ids.slice(0, index)], signal);
    const lines = found.map(({ text, share }) => `${percent(share)}  “${text}”`);
    $("token").textContent = `${inWords(token, facts.blocks)}\nFull depth's likeliest:\n${lines.join("\n")}`;
  } catch (error) {
    if (error.name !== "AbortError") $("token").textContent += `\n${error.message}`;
  }
}

// Streams an answer to the messages into a view. `shown`: what the meter shows of it, all or only its speed at full depth.
// The draws of one seed can be compared.
async function stream(view, history, seed, settings, shown = "all") {
  let first = 0;
  running = new AbortController();
  $("stop").disabled = false;
  $("send").disabled = true;
  try {
    const body = {
      model: facts.model, messages: history, offramp: settings, seed,
      temperature: Number($("temperature").value), max_tokens: Number($("length").value),
    };
    await answer(body, running.signal, (text, note, reason) => {
      if (reason) return finish(view, note, shown);
      first ||= performance.now();
      view.add(text, note);
      if (shown !== "all") return;
      const blocks = view.tokens.reduce((sum, token) => sum + token.block, 0) / view.tokens.length;
      const speed = (view.tokens.length - 1) / ((performance.now() - first) / 1000);
      meter({ blocks: `${blocks.toFixed(1)} of ${facts.blocks}`, speed: view.tokens.length > 2 ? speed.toFixed(0) : "–" });
    });
  } catch (error) {
    if (error.name !== "AbortError") view.element.after(element("p", { className: "error", textContent: error.message }));
  } finally {
    running = null;
    $("stop").disabled = true;
    $("send").disabled = false;
  }
}

function finish(view, note, shown) {
  view.prompt = note.prompt_token_ids;
  view.note = note;
  if (note.mean_blocks === undefined) return;
  if (note.fill === "full") speedOfFull = note.tokens_per_second;
  meter({ full: speedOfFull ? speedOfFull.toFixed(0) : "–" });
  if (shown !== "all") return;
  meter({
    blocks: `${note.mean_blocks.toFixed(1)} of ${note.blocks}`,
    saved: percent(note.flops_saved),
    speed: note.tokens_per_second.toFixed(0),
    drafts: note.acceptance_rate === null ? "–" : percent(note.acceptance_rate),
  });
}

function button(text, action) {
  const made = element("button", { type: "button", textContent: text });
  made.addEventListener("click", action);
  return made;
}

async function reply() {
  const history = [...messages];
  const seed = Math.floor(Math.random() * 2 ** 32);
  const view = new AnswerView(facts.blocks, tell);
  const answers = element("div", { className: "answers" }, view.element);
  const turn = element("article", { className: "turn assistant" }, element("h2", { textContent: facts.model }), answers);
  $("log").append(turn);
  turn.scrollIntoView({ block: "nearest" });
  await stream(view, history, seed, way());
  messages.push({ role: "assistant", content: view.text });
  const again = button("Regenerate", async () => {
    if (running) return;
    messages.length = history.length;
    while (turn.nextSibling) turn.nextSibling.remove();
    turn.remove();
    await reply();
  });
  const compare = button("Compare with full depth", async () => {
    if (running) return;
    compare.disabled = true;
    const other = new AnswerView(facts.blocks, tell);
    answers.classList.add("two");
    answers.append(element("div", {}, element("h3", { textContent: "Full depth" }), other.element));
    await stream(other, history, seed, way("full"), "full depth");
    view.mark(other);
    other.mark(view);
    const same = view.text === other.text ? "Both answers are the same." : "Tokens that differ have a frame.";
    answers.after(element("p", { className: "help", textContent: same }));
  });
  const copy = button("Copy", async () => {
    await navigator.clipboard.writeText(view.text);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  });
  turn.append(element("div", { className: "row" }, copy, again, compare));
}

async function send(text) {
  if (!text.trim() || running) return;
  $("starts").hidden = true;
  $("message").value = "";
  messages.push({ role: "user", content: text });
  const turn = element("article", { className: "turn user" }, element("h2", { textContent: "You" }), element("p", { textContent: text }));
  $("log").append(turn);
  await reply();
}

async function begin() {
  try {
    Object.assign(facts, await menu());
  } catch (error) {
    $("log").append(element("p", { className: "error", textContent: error.message }));
    return;
  }
  $("model").textContent = `${facts.model}, ${facts.blocks} blocks`;
  for (const fill of facts.fills) $("fill").append(element("option", { value: fill, textContent: fill }));
  $("fill").value = facts.usual.fill;
  $("point").max = String(Math.max(0, facts.points.length - 1));
  $("point").value = String(Math.max(0, facts.points.findLastIndex((point) => point.passed)));
  $("legend").textContent =
    `A token without a shade ran through all ${facts.blocks} blocks. The stronger the shade, the earlier the exit. ` +
    "A dotted line marks a draft that full depth confirmed.";
  for (const text of STARTS) $("starts").append(button(text, () => send(text)));
  showSettings();
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send($("message").value);
});
$("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send($("message").value);
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  messages.length = 0;
  $("log").replaceChildren();
  $("starts").hidden = false;
  $("message").focus();
});
for (const id of ["fill", "point"]) $(id).addEventListener("input", showSettings);
begin();
