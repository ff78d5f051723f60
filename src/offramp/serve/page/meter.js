// "This answer": the figures that are told of an answer, by its mode.

const FIGURES = {
  passes: ["Tokens a pass", ({ note }) => note.tokens_per_pass.toFixed(1)],
  drafts: ["Drafts that stood", ({ note }) => `${note.num_accepted_tokens} of ${note.num_draft_tokens}`],
  blocks: ["Blocks for a token", ({ note }) => `${note.mean_blocks.toFixed(1)} of ${note.blocks}`],
  saved: ["FLOPs saved", ({ note }) => percent(note.flops_saved)],
  guarantee: ["Guarantee", ({ note }) => promised(note.guarantee)],
  speed: ["Tokens a second", ({ note }) => note.tokens_per_second.toFixed(0)],
  times: ["Times as fast as full depth", ({ note, full }) => (full ? times(note, full) : "not measured")],
};
const SHOWN = {
  full: ["speed"],
  exact: ["passes", "drafts", "speed", "times"],
  early: ["blocks", "saved", "guarantee", "speed", "times"],
};

export function percent(share) {
  return `${(100 * share).toFixed(1)}%`;
}

// How many times as fast an answer was as another one.
export function times(note, other) {
  const ratio = note.tokens_per_second / other.tokens_per_second;
  return ratio < 10 ? ratio.toPrecision(2) : ratio.toFixed(0);
}

function promised(guarantee) {
  if (!guarantee) return "none";
  return `loss (${guarantee.loss}) at most ${guarantee.risk}, with probability ${Number((1 - guarantee.delta).toFixed(4))}`;
}

// Shows an answer's figures: its mode, and once it has ended its `note`. `full`: the note of full depth's answer, if any.
export function showMeter(mode, answer = {}) {
  const rows = SHOWN[mode].map((name) => {
    const [words, figure] = FIGURES[name];
    const row = document.createElement("div");
    const term = Object.assign(document.createElement("dt"), { textContent: words });
    const value = Object.assign(document.createElement("dd"), { textContent: answer.note ? figure(answer) : "–" });
    value.dataset.meter = name;
    row.append(term, value);
    return row;
  });
  document.getElementById("meter").replaceChildren(...rows);
}

// Shows the speed of an answer on its way, in tokens a second.
export function showSpeed(speed) {
  document.querySelector('[data-meter="speed"]').textContent = speed.toFixed(0);
}
