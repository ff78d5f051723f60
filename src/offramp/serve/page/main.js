// The page: a conversation, figures, and the mode and settings that the next answer is made with.

import { alternatives, answer, menu } from "./api.js";
import { AnswerView, inWords } from "./answers.js";
import { percent, showMeter, showSpeed, times } from "./meter.js";

const $ = (id) => document.getElementById(id);
const STARTS = ["Why is the sky blue?", "List three uses of vinegar in the house.", "Write one sentence about the sea."];

const facts = { blocks: 1, model: "", modes: [], points: [] };
let taken = 0; // the place of the point that `early` is at
const messages = [];
let running = null; // the AbortController of the answer on its way

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function button(text, action) {
  const made = element("button", { type: "button", textContent: text });
  made.addEventListener("click", action);
  return made;
}

function help(text) {
  return element("p", { className: "help", textContent: text });
}

function chosenMode() {
  return document.querySelector("#modes :checked").value;
}

// The mode that the server answers in if none is asked for: "early" of "early:3".
function usualMode() {
  return facts.usual.split(":")[0];
}

function showModes() {
  for (const { name, promise, saves } of facts.modes) {
    const radio = element("input", { type: "radio", name: "mode", value: name, checked: name === usualMode() });
    radio.addEventListener("input", showSettings);
    const said = element("span", {}, element("strong", { textContent: name }), element("small", { textContent: ` saves ${saves}` }));
    $("modes").append(element("label", {}, radio, said, element("span", { className: "help", textContent: promise })));
  }
}

function showSettings() {
  if (!document.querySelector(".answer")) showMeter(chosenMode());
  const mode = chosenMode();
  const { points } = facts;
  $("points").hidden = mode !== "early" || !points.length;
  if ($("points").hidden) return;
  $("point").max = String(points.length - 1);
  $("point").value = String(taken);
  const words = measured(points[taken]);
  $("point-value").textContent = words;
  $("point").setAttribute("aria-valuetext", words);
}

// A point of `early` in words.
function measured({ loss, flops_saved: saved, passed }) {
  const alike = Number($("temperature").value) === 0 && Number($("length").value) <= facts.tested.max_tokens;
  const test = !passed ? "did not pass its test" : alike ? "passed its test" : "passed its test, but not with these settings";
  return `saves ${percent(saved)} of FLOPs, answers lose ${percent(loss)} on average; ${test}`;
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

// What the next answer is asked for with. Each time it is drawn anew.
function request() {
  const mode = chosenMode();
  const point = mode === "early" && facts.points.length ? `:${taken + 1}` : "";
  return {
    model: facts.model, messages: [...messages], offramp: { mode: mode + point, ids: true }, seed: Math.floor(Math.random() * 2 ** 32),
    temperature: Number($("temperature").value), max_tokens: Number($("length").value),
  };
}

// Streams an answer into a view. `heard` is called after each token, with the tokens a second so far.
async function stream(view, body, heard = () => {}) {
  let first = 0;
  running = new AbortController();
  $("stop").disabled = false;
  $("send").disabled = true;
  try {
    await answer(body, running.signal, (text, note, reason) => {
      if (reason) {
        view.prompt = note.prompt_token_ids;
        view.note = note.mode && note; // an answer without tokens has no figures
        return;
      }
      first ||= performance.now();
      view.add(text, note);
      if (view.tokens.length > 2) heard((view.tokens.length - 1) / ((performance.now() - first) / 1000));
    });
  } catch (error) {
    if (error.name !== "AbortError") view.element.after(element("p", { className: "error", textContent: error.message }));
  } finally {
    running = null;
    $("stop").disabled = true;
    $("send").disabled = false;
  }
}

function legend(view) {
  const items = view.legend.map(([colour, words]) => {
    const sample = element("span", { className: `token sample ${colour}`, textContent: "ab" });
    sample.setAttribute("aria-hidden", "true");
    return element("li", {}, sample, ` ${words}`);
  });
  return element("ul", { className: "legend" }, ...items);
}

// Answers what was said last. `before`: the answer that this one takes the place of, if any.
async function reply(before = null) {
  const body = request();
  const mode = chosenMode();
  const view = new AnswerView(mode, facts.blocks, tell);
  const answers = element("div", { className: "answers" }, element("div", {}, view.element));
  const turn = element("article", { className: "turn assistant" }, element("h2", { textContent: `${facts.model}, ${body.offramp.mode}` }), answers);
  $("log").append(turn);
  turn.scrollIntoView({ block: "nearest" });
  showMeter(mode);
  await stream(view, body, showSpeed);
  if (!turn.isConnected) return; // a new conversation has begun
  showMeter(mode, view);
  messages.push({ role: "assistant", content: view.text });
  if (view.legend.length) turn.append(legend(view));
  if (before === view.text && body.temperature === 0) {
    turn.append(help("The same answer: at temperature 0 nothing is drawn. Raise the temperature for another one."));
  }
  const again = button("Regenerate", async () => {
    if (running) return;
    messages.length = body.messages.length;
    while (turn.nextSibling) turn.nextSibling.remove();
    turn.remove();
    await reply(view.text);
  });
  const copy = button("Copy", async () => {
    await navigator.clipboard.writeText(view.text);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  });
  const buttons = [copy, again, ...(mode === "full" ? [] : [compareButton(view, body, answers)])];
  turn.append(element("div", { className: "row" }, ...buttons));
  turn.scrollIntoView({ block: "nearest" });
}

// A button that answers the same request at full depth, beside the answer, and tells how many times as fast the answer was.
function compareButton(view, body, answers) {
  const compare = button("Compare with full depth", async () => {
    if (running) return;
    compare.disabled = true;
    const other = new AnswerView("full", facts.blocks, tell);
    answers.firstChild.prepend(element("h3", { textContent: view.mode }));
    answers.classList.add("two");
    answers.append(element("div", {}, element("h3", { textContent: "full" }), other.element));
    await stream(other, { ...body, offramp: { mode: "full", ids: true } });
    view.mark(other);
    other.mark(view);
    view.full = other.note;
    showMeter(view.mode, view);
    const same = view.text === other.text ? "Both answers are the same." : "Tokens that differ have a frame.";
    answers.after(help(`${same}${speeds(view, other)}`));
  });
  return compare;
}

function speeds(view, other) {
  if (!view.note || !other.note) return "";
  const [own, full] = [view, other].map(({ note }) => note.tokens_per_second.toFixed(0));
  return ` ${own} tokens a second against ${full}: ${times(view.note, other.note)} times as fast.`;
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
  taken = Math.max(0, facts.points.findLastIndex((point) => point.passed));
  const named = Number(facts.usual.split(":")[1]);
  if (named) taken = named - 1;
  showModes();
  showSettings();
  for (const text of STARTS) $("starts").append(button(text, () => send(text)));
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
  showSettings();
});
$("point").addEventListener("input", () => {
  taken = Number($("point").value);
});
for (const id of ["point", "temperature", "length"]) $(id).addEventListener("input", showSettings);
begin();
