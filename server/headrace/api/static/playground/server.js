// What the page asks of the server: models, metrics, and an answer as it is written.

/** What the server said no with: `message` is its own, `detail` names status, code and field. */
export class ServerError extends Error {
  constructor(message, { status = 0, code = null, param = null } = {}) {
    super(message);
    this.status = status;
    const named = [status || null, code, param && `field ${param}`];
    this.detail = named.filter((part) => part !== null && part !== "").join(" · ");
  }
}

function headers(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(`The server cannot be reached (${error.message}).`);
  }
  if (response.ok) return response;
  const text = await response.text();
  let said = null;
  try {
    said = JSON.parse(text).error;
  } catch {
    // Not ours: a proxy's page, perhaps.
  }
  const message = said?.message ?? (text.slice(0, 500) || response.statusText || "No reason given.");
  throw new ServerError(message, { ...said, status: response.status });
}

/** The models' cards. Raises ServerError. */
export async function listModels(key) {
  const response = await ask("v1/models", { headers: headers(key) });
  return (await response.json()).data;
}

/**
 * Samples of /metrics by name, summed over their labels: this page shows one server's total.
 * The text format: https://prometheus.io/docs/instrumenting/exposition_formats/
 */
export async function readMetrics() {
  const response = await ask("metrics", {});
  const samples = new Map();
  for (const line of (await response.text()).split("\n")) {
    const match = /^(headrace_\w+)(?:\{.*\})? (\S+)/.exec(line);
    if (match) samples.set(match[1], (samples.get(match[1]) ?? 0) + Number(match[2]));
  }
  return samples;
}

/**
 * Yields the chunks of a streamed chat completion.
 * Raises ServerError, also for an error in the middle of the stream; AbortError when stopped.
 */
export async function* streamChat(body, key, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json", ...headers(key) },
    body: JSON.stringify(body),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message, chunk.error);
    yield chunk;
  }
  throw new ServerError("The connection broke before the answer ended.");
}

/** The data of server-sent events. https://html.spec.whatwg.org/multipage/server-sent-events.html */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      // A data line is an event: the server's JSON has no line breaks.
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim();
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(`The connection broke: ${error.message}.`);
  } finally {
    reader.cancel().catch(() => {});
  }
}
