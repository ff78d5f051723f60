// Shows answers: each token shaded by the block that it left after, and what is known of it.

// An element for an answer, to which tokens are added. `blocks`: the model's depth; `told` gets a token that is pointed at.
export class AnswerView {
  constructor(blocks, told) {
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
    const early = note.block < this.blocks;
    span.className = `token${early ? " early" : ""}${note.drafted ? " drafted" : ""}`;
    if (early) span.style.setProperty("--saved", String(1 - note.block / this.blocks));
    span.textContent = text;
    span.dataset.index = String(this.tokens.length);
    this.tokens.push({ text, ...note });
    this.spans.push(span);
    this.element.append(span);
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
  const place = token.block >= blocks ? `full depth (${blocks} blocks)` : `after block ${token.block} of ${blocks}`;
  const sure = token.confidence === null ? "" : `, confidence ${(100 * token.confidence).toFixed(0)}%`;
  const how = token.drafted ? "A draft that stood, made " : token.block < blocks ? "Left " : "Chosen at ";
  return `“${token.text}”\n${how}${place}${sure}.`;
}
