// Talks to the server that this page comes from.

const key = new URLSearchParams(location.hash.slice(1)).get("key");
const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };

export async function menu() {
  const response = await fetch("offramp/menu", { headers });
  if (!response.ok) throw new Error(await words(response));
  return response.json();
}

// The likeliest tokens, at full depth, after the ids of a text.
export async function alternatives(model, ids, signal) {
  const body = { model, prompt: ids, max_tokens: 1, temperature: 0, logprobs: 5, offramp: { mode: "full" } };
  const response = await fetch("v1/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!response.ok) throw new Error(await words(response));
  const { choices } = await response.json();
  return Object.entries(choices[0].logprobs.top_logprobs[0]).map(([text, nats]) => ({ text, share: Math.exp(nats) }));
}

// Streams an answer: `heard` gets each part's text and what the server notes about it; the last note has the totals.
export async function answer(body, signal, heard) {
  const response = await fetch("v1/chat/completions", {
    method: "POST", headers, signal, body: JSON.stringify({ ...body, stream: true }),
  });
  if (!response.ok) throw new Error(await words(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const part = JSON.parse(data);
      if (part.error) throw new Error(part.error.message);
      for (const choice of part.choices) heard(choice.delta.content ?? "", choice.offramp, choice.finish_reason);
    }
  }
}

async function words(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}
