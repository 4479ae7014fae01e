// The conversation: what is asked, what comes back, and the settings that go with it.

import { startCharts } from "./charts.js";
import { render } from "./markdown.js";
import { ServerError, listModels, streamChat } from "./server.js";

const KEY = "headrace.api_key"; // in sessionStorage: gone with the tab
const RETRY = 2000; // ms until the models are asked for again

const $ = (id) => document.getElementById(id);
const messages = []; // what the model has seen, without the system prompt
let running = null; // the AbortController of the answer that is being written

// --- models ---------------------------------------------------------------------------------

let asking = 0; // only the last question's answer counts

async function showModels() {
  const asked = ++asking;
  const chosen = $("model").value;
  let wait = false;
  try {
    const cards = await listModels($("key").value);
    if (asked !== asking) return;
    $("model").replaceChildren(...cards.map(({ id }) => new Option(id, id, false, id === chosen)));
    $("model").disabled = !cards.length;
    const card = cards.find(({ id }) => id === $("model").value);
    const loading = !card?.max_model_len;
    wait = loading;
    $("status").textContent = loading
      ? `${card?.state ?? "no model"} …`
      : `context of ${card.max_model_len.toLocaleString("en")} tokens`;
  } catch (error) {
    if (asked !== asking) return;
    $("status").textContent = error.message;
    wait = error.status !== 401;
  }
  if (wait) setTimeout(() => asked === asking && showModels(), RETRY);
}

// --- the request ----------------------------------------------------------------------------

/** The body, or an Error that says which setting is wrong. */
function requestBody() {
  const system = $("system").value.trim();
  const body = {
    model: $("model").value || undefined,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    stream: true,
    stream_options: { include_usage: true },
  };
  for (const input of $("settings").querySelectorAll("input[name]")) {
    // Ranges are the server's to judge; only what is no number cannot be sent.
    if (input.validity.badInput) throw new Error(`${input.name} must be a number.`);
    if (input.value !== "") body[input.name] = Number(input.value);
  }
  const schema = $("schema").value.trim();
  if (schema) {
    try {
      const parsed = JSON.parse(schema);
      const json_schema = { name: "answer", strict: true, schema: parsed };
      body.response_format = { type: "json_schema", json_schema };
    } catch (error) {
      throw new Error(`The JSON schema is not JSON: ${error.message}`);
    }
  }
  return body;
}

// --- one answer -----------------------------------------------------------------------------

/** The article of an answer; drawn at most once a frame, however fast tokens come. */
class AnswerView {
  constructor() {
    this.text = this.thinking = "";
    this.element = document.createElement("article");
    this.element.className = "assistant busy";
    this.textElement = add(this.element, "div", "text");
    this.footer = add(this.element, "footer");
    this.stats = add(this.footer, "span");
    this.began = performance.now();
    this.first = this.last = 0;
    this.events = 0;
    this.drawn = true;
    append(this.element);
  }

  take(chunk) {
    const delta = chunk.choices[0]?.delta ?? {};
    const thinking = delta.reasoning_content ?? delta.reasoning ?? "";
    this.usage = chunk.usage ?? this.usage;
    this.reason = chunk.choices[0]?.finish_reason ?? this.reason;
    if (!delta.content && !thinking) return;
    this.last = performance.now();
    this.first ||= this.last;
    this.events++;
    this.text += delta.content ?? "";
    this.thinking += thinking;
    if (this.drawn) requestAnimationFrame(() => this.draw());
    this.drawn = false;
  }

  draw() {
    this.drawn = true;
    const log = $("log");
    const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    if (this.thinking) {
      if (!this.thinkingElement) {
        const details = document.createElement("details");
        add(details, "summary").textContent = "Reasoning";
        this.thinkingElement = add(details, "div", "thinking");
        this.element.prepend(details);
      }
      this.thinkingElement.textContent = this.thinking;
    }
    this.textElement.replaceChildren(render(this.text));
    this.stats.textContent = this.summary();
    if (follows) log.scrollTop = log.scrollHeight;
  }

  summary() {
    if (!this.first) return "";
    const tokens = this.usage?.completion_tokens ?? this.events;
    const seconds = (this.last - this.first) / 1000;
    // The first token ends the prefill; the gaps after it are the decode rate.
    const rate = tokens > 1 && seconds > 0 ? `${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    const wait = `first after ${((this.first - this.began) / 1000).toFixed(2)} s`;
    const ended = { length: "cut at the token limit", stopped: "stopped" }[this.reason];
    return [`${tokens} tokens`, rate, wait, ended].filter(Boolean).join(" · ");
  }

  end(error) {
    this.element.classList.remove("busy");
    this.draw();
    if (this.text) {
      const button = add(this.footer, "button");
      button.type = "button";
      button.textContent = "Copy";
      button.addEventListener("click", () => copy(this.text, button));
    }
    if (!error) return;
    const note = add(this.element, "p", "error");
    note.role = "alert";
    note.textContent = error.message;
    if (error.detail) add(note, "small").textContent = error.detail;
    $("log").scrollTop = $("log").scrollHeight;
  }
}

async function send() {
  const prompt = $("prompt").value.trim();
  if (!prompt || running) return;
  messages.push({ role: "user", content: prompt });
  const asked = document.createElement("article");
  asked.className = "user";
  asked.textContent = prompt;
  append(asked);
  $("prompt").value = "";
  const view = new AnswerView();
  const control = (running = new AbortController());
  showRunning();
  let failure = null;
  try {
    const chunks = streamChat(requestBody(), $("key").value, control.signal);
    for await (const chunk of chunks) view.take(chunk);
  } catch (error) {
    if (error.name === "AbortError") view.reason = "stopped";
    else failure = error;
    if (!(error instanceof ServerError) && error.name !== "AbortError") console.warn(error.message);
  }
  if (!view.element.isConnected) return; // cleared meanwhile
  running = null;
  showRunning();
  view.end(failure);
  if (view.text) {
    messages.push({ role: "assistant", content: view.text });
  } else {
    // Nothing was said: the next question must not follow upon this one.
    messages.pop();
    if (failure && !$("prompt").value) $("prompt").value = prompt;
  }
  if (failure?.status === 401) {
    openSettings(true);
    $("key").focus();
  }
}

function stop() {
  running?.abort();
}

function clear() {
  stop();
  running = null;
  showRunning();
  messages.length = 0;
  $("log").replaceChildren($("hint"));
  $("hint").hidden = false;
  $("prompt").focus();
}

// --- the page -------------------------------------------------------------------------------

function add(parent, tag, className = "") {
  const made = document.createElement(tag);
  made.className = className;
  parent.append(made);
  return made;
}

function append(article) {
  $("hint").hidden = true;
  $("log").append(article);
  $("log").scrollTop = $("log").scrollHeight;
}

function showRunning() {
  const hadFocus = [$("send"), $("stop")].includes(document.activeElement);
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  if (hadFocus) (running ? $("stop") : $("send")).focus();
}

async function copy(text, button) {
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    done = copyWithoutPermission(text); // plain HTTP from another machine has no clipboard
  }
  button.textContent = done ? "Copied" : "Cannot copy";
  button.focus();
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

function copyWithoutPermission(text) {
  const area = add(document.body, "textarea", "hidden");
  area.value = text;
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}

function openSettings(open) {
  $("side").classList.toggle("open", open);
  $("toggle").setAttribute("aria-expanded", String(open));
  $("toggle").textContent = open ? "Chat" : "Settings";
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("prompt").addEventListener("keydown", (event) => {
  // While an input method composes a word, Enter is its own.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) stop();
  else openSettings(false);
});
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("stop").addEventListener("click", stop);
$("clear").addEventListener("click", clear);
$("toggle").addEventListener("click", () => openSettings(!$("side").classList.contains("open")));
$("key").value = sessionStorage.getItem(KEY) ?? "";
$("key").addEventListener("change", () => {
  sessionStorage.setItem(KEY, $("key").value);
  showModels();
});

showModels();
startCharts();
