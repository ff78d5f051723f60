// Shows answers: each token coloured by what it came from, and what is known of it.

const SOURCES = {
  exit: { short: "exit", drafted: (token) => `A draft of the exit after block ${token.block}` },
  text: { short: "earlier text", drafted: () => "A draft from earlier text, which repeats itself here" },
  table: { short: "table", drafted: () => "A draft from the table of frequent word sequences" },
  full: { short: "full depth" },
};

// An element for an answer, to which tokens are added. `blocks`: the model's depth; `told` gets a token that is pointed at.
export class AnswerView {
  constructor(mode, blocks, told) {
    this.mode = mode;
    this.blocks = blocks;
    this.told = told;
    this.tokens = [];
    this.spans = [];
    this.chosen = -1;
    this.element = document.createElement("p");
    this.element.className = "answer";
    this.element.tabIndex = 0;
    this.element.setAttribute("role", "group");
    this.element.setAttribute("aria-label", "Answer. The arrow keys move from token to token.");
    this.element.addEventListener("keydown", (event) => this.#key(event));
    this.element.addEventListener("pointerover", (event) => this.#point(event));
    this.element.addEventListener("click", (event) => this.#point(event));
    this.element.addEventListener("blur", () => this.#choose(-1));
  }

  get text() {
    return this.tokens.map((token) => token.text).join("");
  }

  get ids() {
    return this.tokens.map((token) => token.id);
  }

  add(text, note) {
    const span = document.createElement("span");
    span.className = `token ${this.#colour(note)}`;
    span.style.setProperty("--saved", String(1 - note.block / this.blocks));
    span.textContent = text;
    span.dataset.index = String(this.tokens.length);
    this.tokens.push({ text, ...note });
    this.spans.push(span);
    this.element.append(span);
  }

  #colour(note) {
    return this.mode === "early" ? (note.block < this.blocks ? "early" : "full") : note.source;
  }

  // What the colours mean, with the number of tokens of each: pairs of a class and words. Empty where nothing is coloured.
  get legend() {
    const count = (colour) => this.tokens.filter((token) => this.#colour(token) === colour).length;
    const exact = Object.entries(SOURCES).map(([source, { short }]) => [source, `${short} ${count(source)}`]);
    const early = [["early", `left early ${count("early")} (stronger: after fewer blocks)`], ["full", `full depth ${count("full")}`]];
    return { exact, early, full: [] }[this.mode];
  }

  // Marks the tokens from the first on that differ from another answer's.
  mark(other) {
    this.spans.forEach((span, index) => span.classList.toggle("differs", this.ids[index] !== other.ids[index]));
  }

  #key(event) {
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    const ends = { Home: 0, End: this.tokens.length - 1 };
    if (!(event.key in steps) && !(event.key in ends)) return;
    event.preventDefault();
    const next = event.key in ends ? ends[event.key] : this.chosen + steps[event.key];
    this.#choose(Math.max(0, Math.min(this.tokens.length - 1, next)));
  }

  #point(event) {
    const index = event.target.dataset?.index;
    if (index !== undefined) this.#choose(Number(index));
  }

  #choose(index) {
    if (this.chosen === index) return;
    this.spans[this.chosen]?.classList.remove("chosen");
    this.chosen = index;
    this.spans[index]?.classList.add("chosen");
    if (index >= 0) this.told(this, index);
  }
}

// A token in words.
export function inWords(token, blocks) {
  const sure = token.confidence === null ? "" : `, confidence ${(100 * token.confidence).toFixed(0)}%`;
  const left = token.block < blocks ? `Left after block ${token.block} of ${blocks}` : `Chosen at full depth (${blocks} blocks)`;
  const how = token.drafted ? SOURCES[token.source].drafted(token) : left;
  return `“${token.text}”\n${how}${sure}.${token.drafted ? " Full depth chose the same token." : ""}`;
}
