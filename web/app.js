/* llmchat's page: one module, no framework, no build step, read top to bottom.

       server ──API──▶ Conversation (a tree) ──▶ Turn (one per message on the path) ──▶ the document
              ──SSE──▶ AnswerStream ───────────▶ Turn

   What holds everywhere: an answer is HTML made by the server, and a block of it that has settled is never touched
   again; text typed by a person leaves the box only after the server has it; a stream is open only while the page is
   visible and something runs in the conversation that is shown; the page asks nobody but its own origin.

    1 Small tools        5 Answers as HTML     9 Composer           13 Connection and polling
    2 Memory             6 Turns              10 Sidebar            14 Keyboard
    3 API                7 The page's middle  11 Menu and picker    15 Addresses and start
    4 Conversation       8 Answers and stream 12 Settings                                                          */

// ── 1. Small tools ───────────────────────────────────────────────────────────────────────────────────────────────

const $ = (id) => document.getElementById(id);
const isTouch = matchMedia("(hover: none) and (pointer: coarse)");
const isNarrow = matchMedia("(max-width: 760px)");
const isApple = /Mac|iPhone|iPad/.test(navigator.platform);
const wait = (ms) => new Promise((done) => setTimeout(done, ms));

/** A new element. Names with a dash and `role` become attributes, everything else properties. */
function make(tag, given = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (name === "class") node.className = value;
    else if (name.includes("-") || name === "role") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

function icon(name, viewBox = null) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  if (viewBox) {
    svg.setAttribute("viewBox", viewBox);
    svg.setAttribute("class", "mark");
  }
  svg.append(use);
  return svg;
}

const iconButton = (label, name, onclick, more = {}) =>
  make("button", { type: "button", class: "icon", "aria-label": label, title: label, onclick, ...more }, icon(name));

const textButton = (label, onclick, style = "") =>
  make("button", { type: "button", class: `button ${style}`, onclick }, label);

/** Makes `nodes` the children of a parent, in order, and moves only what is not in its place. */
function place(parent, nodes) {
  let at = parent.firstChild;
  for (const node of nodes) {
    if (node === at) at = at.nextSibling;
    else parent.insertBefore(node, at);
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

/** Says something to a screen reader, once; nothing else on the page is live. */
function announce(text) {
  $("announcer").textContent = "";
  setTimeout(() => ($("announcer").textContent = text), 50);
}

/** A short message at the bottom, with one thing to do about it; returns a function that takes it away. */
function toast(text, label = "", act = null, ms = 6000) {
  const node = make("div", { class: "toast" }, make("span", {}, text));
  const leave = () => node.remove();
  const timer = setTimeout(leave, ms);
  if (label) {
    node.append(make("button", { type: "button", onclick: () => (clearTimeout(timer), leave(), act()) }, label));
  }
  $("toasts").append(node);
  announce(text);
  return leave;
}

async function copyText(promise) {
  const text = await promise;
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = make("textarea", { value: text, class: "hidden-text" }); // plain http on a local network has no clipboard
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

const seconds = (ms) => (ms < 10_000 ? (ms / 1000).toFixed(ms < 1000 ? 2 : 1) : String(Math.round(ms / 1000))) + " s";

// ── 2. Memory ────────────────────────────────────────────────────────────────────────────────────────────────────
//
// What the browser keeps: theme, last model, drafts. It may refuse to keep anything (private
// windows, blocked storage, a full disk): then the page works all the same and forgets.

const memory = {
  get(key) {
    try {
      return localStorage.getItem(`llmchat.${key}`);
    } catch {
      return null;
    }
  },
  set(key, value) {
    try {
      if (value) localStorage.setItem(`llmchat.${key}`, value);
      else localStorage.removeItem(`llmchat.${key}`);
    } catch {
      // forgotten
    }
  },
};

/** Everything that is not in the document itself. */
const state = {
  list: [], // summaries of conversations, newest first
  before: null, // the cursor of the list's next part
  found: null, // the results of a search, or null
  unread: new Set(), // conversations that finished while another one was looked at
  deleting: new Map(), // conversation id → timer: deleted here, not yet there
  providers: [],
  model: memory.get("model") || "", // provider/model, empty: the server's default
  conversation: null, // the one that is shown
  images: [], // to be sent: {name, url}
  stream: null, // the one open AnswerStream
  lost: false, // the server did not answer last time
};

// ── 3. API ───────────────────────────────────────────────────────────────────────────────────────────────────────

class ApiError extends Error {
  constructor(code, message, status = 0) {
    super(message);
    this.code = code;
    this.status = status;
  }
}

/** One call; its answer as a value. Raises ApiError with the server's own words, or with code "offline". */
async function api(method, path, body = undefined, { key = "", type = "application/json", timeout = 60_000, ...options } = {}) {
  const headers = { Accept: "application/json" };
  if (body !== undefined) headers["Content-Type"] = type;
  if (key) headers["Idempotency-Key"] = key;
  const isEncoded = body === undefined || typeof body === "string" || body instanceof Blob;
  let response;
  try {
    const signal = AbortSignal.timeout(timeout);
    response = await fetch(path, { method, headers, body: isEncoded ? body : JSON.stringify(body), signal, ...options });
  } catch {
    setLost(true);
    throw new ApiError("offline", navigator.onLine ? "The server cannot be reached." : "This device is offline.");
  }
  setLost(false);
  if (response.status === 401) signIn();
  const value = await response.json().catch(() => ({}));
  if (response.ok) return value;
  const error = value.error ?? {};
  throw new ApiError(error.code ?? "internal", error.message ?? `The server answered ${response.status}.`, response.status);
}

/** The one place that knows what to do without a session. */
function signIn() {
  saveDraft();
  location.assign(`/sign-in?next=${encodeURIComponent(location.pathname)}`);
}

/** A random key: the same request sent twice under it is done once. Plain http has no crypto.randomUUID. */
const newKey = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");

// ── 4. Conversation ──────────────────────────────────────────────────────────────────────────────────────────────
//
// A tree of messages and a way through it. Messages that the server does not have yet carry negative ids. A message
// object stays the same object for as long as the conversation is shown: turns hang on it.

let localId = 0;
const TURNS_AT_ONCE = 10; // a long conversation is drawn from its end, a few turns per task, so that nothing stutters

class Conversation {
  constructor() {
    this.id = null;
    this.title = "";
    this.system = "";
    this.parameters = {};
    this.updated_at_ms = 0;
    this.messages = new Map();
    this.choices = new Map(); // parent id → the child that is shown; without one, the newest
    this.loaded = true;
    this.ours = false; // the next change of updated_at_ms is our own
    this.drawn = TURNS_AT_ONCE; // so many of the newest turns are in the document
  }

  /** Takes what the server has; follows the newest path if the one shown only grew. */
  /** Takes in what was asked for at a moment; messages that have changed since stay as they are. */
  adopt(data, askedAt) {
    const last = this.path().at(-1);
    Object.assign(this, { id: data.id, title: data.title, system: data.system, parameters: data.parameters });
    Object.assign(this, { updated_at_ms: data.updated_at_ms, loaded: true });
    const local = [...this.messages.values()].filter((message) => message.id < 0);
    const messages = data.messages.map((message) => {
      const known = this.messages.get(message.id) ?? {};
      return known.changedAt > askedAt ? known : Object.assign(known, message);
    });
    this.messages = new Map([...messages, ...local].map((message) => [message.id, message]));
    if (!last || data.path.includes(last.id)) this.show(data.path);
  }

  show(path) {
    for (const id of path) this.choices.set(this.messages.get(id).parent_id, id);
  }

  /** Shows the branch that a message is on. */
  reveal(id) {
    for (let message = this.messages.get(id); message; message = this.messages.get(message.parent_id)) {
      this.choices.set(message.parent_id, message.id);
    }
  }

  children() {
    const children = new Map();
    for (const message of this.messages.values()) {
      const siblings = children.get(message.parent_id);
      if (siblings) siblings.push(message);
      else children.set(message.parent_id, [message]);
    }
    return children;
  }

  path(children = this.children()) {
    const path = [];
    for (let below = children.get(null); below; below = children.get(path.at(-1).id)) {
      path.push(below.find((one) => one.id === this.choices.get(one.parent_id)) ?? below.at(-1));
    }
    return path;
  }

  running() {
    return this.path().find((message) => message.status === "running") ?? null;
  }

  add(message) {
    const local = { id: --localId, status: "running", text: "", content: [], created_at_ms: Date.now(), ...message };
    this.messages.set(local.id, local);
    this.choices.set(local.parent_id, local.id);
    return local;
  }

  remove(message) {
    this.messages.delete(message.id);
    this.choices.delete(message.parent_id);
  }

  /** Gives a local message the id that the server has for it. */
  settle(message, id) {
    const old = message.id;
    this.messages.delete(old);
    message.id = id;
    this.messages.set(id, message);
    this.choices.set(message.parent_id, id);
    for (const one of this.messages.values()) if (one.parent_id === old) one.parent_id = id;
    this.choices.set(id, this.choices.get(old));
    this.choices.delete(old);
  }
}

const textOf = (message) => message.content.filter((part) => part.kind === "text").map((part) => part.text).join("");
const reasoningOf = (message) => message.content.filter((part) => part.kind === "reasoning").map((part) => part.text).join("");
const imagesOf = (message) =>
  message.content
    .filter((part) => part.kind === "image")
    .map((part) => JSON.parse(part.text))
    .map((image) => `data:${image.media_type};base64,${image.data}`);
const modelOf = (message) => (message.model ? `${message.provider}/${message.model}` : "");

// ── 5. Answers as HTML ───────────────────────────────────────────────────────────────────────────────────────────
//
// The server sends blocks by number, and an open one at the end. On every connection it sends everything once more;
// whatever is equal to what stands here is not touched, so a selection survives and nothing flickers. What differs is
// changed where it differs: text that grew gets its new end, and only that.

const parser = document.createElement("template");

function parseBlock(html) {
  parser.innerHTML = html;
  const nodes = [...parser.content.children];
  for (const node of parser.content.querySelectorAll("pre, .table")) node.tabIndex = 0; // what scrolls can be reached by keyboard
  for (const box of parser.content.querySelectorAll("input")) box.setAttribute("aria-label", box.checked ? "done" : "to do");
  parser.replaceChildren();
  return nodes;
}

function hasSameAttributes(old, wanted) {
  if (old.attributes.length !== wanted.attributes.length) return false;
  return [...wanted.attributes].every(({ name, value }) => old.getAttribute(name) === value);
}

/** Makes one node equal to another with as little change as there can be. */
function morph(old, wanted) {
  if (old.isEqualNode(wanted)) return;
  if (old.nodeType === Node.TEXT_NODE && wanted.nodeType === Node.TEXT_NODE) {
    if (wanted.data.startsWith(old.data)) old.appendData(wanted.data.slice(old.data.length));
    else old.data = wanted.data;
  } else if (old.nodeName !== wanted.nodeName || !old.attributes || !hasSameAttributes(old, wanted)) {
    old.replaceWith(wanted);
  } else {
    morphAll(old, old.firstChild, [...wanted.childNodes]);
  }
}

/** Makes the children of a parent from `at` on equal to `wanted`. */
function morphAll(parent, at, wanted) {
  for (const node of wanted) {
    const next = at?.nextSibling ?? null;
    if (at) morph(at, node);
    else parent.append(node);
    at = next;
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

const WHOLE_CHARACTERS_MIN = 8_000; // of HTML: in shorter answers the guessed heights of blocks cost more than they save

class AnswerBody {
  constructor(element) {
    this.element = element;
    this.blocks = []; // HTML of the settled ones
    this.counts = []; // elements of each
    this.open = "";
    this.isFresh = true; // the next frame says everything
  }

  get isEmpty() {
    return this.element.firstChild === null;
  }

  /** A new connection begins. */
  begin() {
    this.isFresh = true;
    this.element.classList.remove("whole");
  }

  show(html) {
    if (this.isEmpty && html.length > WHOLE_CHARACTERS_MIN) this.element.classList.add("whole");
    this.isFresh = true;
    this.apply([[0, html]], "");
  }

  apply(settled, open) {
    const isNothing = settled.length === 0 && open === "";
    if (this.isFresh && isNothing && !this.isEmpty) return; // the server has not begun to render; what stands here stays
    const blocks = this.isFresh ? [] : [...this.blocks];
    for (const [number, html] of settled) blocks[number] = html;
    this.isFresh = this.isFresh && isNothing;
    let first = 0;
    while (first < blocks.length && blocks[first] === this.blocks[first]) first += 1;
    if (first === blocks.length && first === this.blocks.length && open === this.open) return;
    const start = this.counts.slice(0, first).reduce((sum, count) => sum + count, 0);
    const changed = blocks.slice(first).map(parseBlock);
    morphAll(this.element, this.element.children[start] ?? null, [...changed.flat(), ...parseBlock(open)]);
    this.counts = [...this.counts.slice(0, first), ...changed.map((nodes) => nodes.length)];
    this.blocks = blocks;
    this.open = open;
  }
}

// ── 6. Turns ─────────────────────────────────────────────────────────────────────────────────────────────────────
//
// A message on the page. `update` is cheap when nothing changed: it compares what it would draw from.

const turns = new WeakMap(); // message → Turn

function turnOf(message) {
  if (!turns.has(message)) turns.set(message, message.role === "assistant" ? new AnswerTurn(message) : new QuestionTurn(message));
  return turns.get(message);
}

class Turn {
  constructor(message, kind) {
    this.message = message;
    this.drawn = "";
    this.foot = make("div", { class: "foot" });
    this.element = make("section", { class: `turn ${kind}${message.id < 0 ? " fresh" : ""}` });
  }

  /** `place`: {siblings, index, isLeaf, isBusy}. */
  update(place) {
    const { text, content, html, ...small } = this.message;
    const ids = place.siblings.map((one) => one.id);
    const sign = JSON.stringify([small, html?.length, content.length, ids, place.index, place.isLeaf, place.isBusy]);
    if (sign !== this.drawn) {
      this.drawn = sign;
      this.place = place;
      this.draw();
    }
    return this.element;
  }

  branches() {
    const { siblings, index } = this.place;
    if (siblings.length < 2) return null;
    const go = (step) => {
      state.conversation.choices.set(this.message.parent_id, siblings[index + step].id);
      renderConversation();
      syncStream();
      const there = turnOf(siblings[index + step]).element.querySelectorAll(".branches button");
      there[step < 0 ? 0 : 1]?.focus();
    };
    return make(
      "div",
      { class: "branches", role: "group", "aria-label": "Versions" },
      iconButton("Previous version", "left", () => go(-1), { disabled: index === 0 }),
      make("span", {}, `${index + 1}/${siblings.length}`),
      iconButton("Next version", "right", () => go(1), { disabled: index === siblings.length - 1 }),
    );
  }

  copyButton(label) {
    const button = iconButton(label, "copy", async () => {
      await copyText(textOf(this.message));
      button.replaceChildren(icon("check"));
      announce("Copied");
      setTimeout(() => button.replaceChildren(icon("copy")), 1600);
    });
    return button;
  }
}

class QuestionTurn extends Turn {
  constructor(message) {
    super(message, message.role === "user" ? "user" : "answer");
    this.editor = null;
  }

  draw() {
    const { message, place } = this;
    this.element.classList.toggle("sending", message.id < 0);
    if (this.editor) return;
    if (message.role !== "user") return this.drawTool();
    const images = imagesOf(message).map((url, index) => make("img", { src: url, alt: `Image ${index + 1}` }));
    const edit = iconButton("Edit", "pencil", () => this.edit(), { disabled: place.isBusy });
    const actions = make("div", { class: "actions" }, message.text && this.copyButton("Copy message"), edit);
    this.foot.replaceChildren(...[actions, this.branches()].filter(Boolean));
    this.element.replaceChildren(
      make("h2", { class: "hidden-text" }, "You said"),
      ...(images.length ? [make("div", { class: "images" }, ...images)] : []),
      ...(message.text ? [make("div", { class: "bubble" }, message.text)] : []),
      this.foot,
    );
  }

  drawTool() {
    const name = this.message.role === "tool" ? "Result of a tool" : "Instruction";
    const details = make("details", { class: "tool" }, make("summary", {}, icon("right"), name), make("pre", { tabIndex: 0 }, this.message.text));
    this.element.replaceChildren(make("h2", { class: "hidden-text" }, name), details);
  }

  edit() {
    const area = make("textarea", { value: this.message.text, "aria-label": "Edit your message", rows: 2 });
    const close = () => {
      this.editor = null;
      this.draw();
      $("box").focus();
    };
    const save = () => {
      if (!area.value.trim() && !imagesOf(this.message).length) return;
      this.editor = null;
      this.draw();
      sendEdited(this.message, area.value);
    };
    area.onkeydown = (event) => {
      if (event.key === "Escape" && !event.isComposing) close();
      else if (sendsOnEnter(event)) save();
      else return;
      event.preventDefault();
      event.stopPropagation();
    };
    const buttons = make("div", { class: "buttons" }, textButton("Cancel", close), textButton("Send", save, "primary"));
    this.editor = make("div", { class: "edit" }, area, buttons);
    this.element.replaceChildren(this.editor);
    fit(area);
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
}

const ENDINGS = {
  stopped: "You stopped this answer.",
  interrupted: "The server stopped while this was being written. What you see is kept.",
  length: "The answer reached its limit of tokens.",
  content_filter: "The provider’s filter ended this answer.",
};

/** What an error is in a few words, and what can be done about it; the server's own message stands between the two. */
const TROUBLES = {
  provider_auth: ["The provider did not accept the key", "Set the key, restart llmchat, then try again."],
  provider_rate_limited: ["The provider asks for a pause", "Wait a moment, or try another model."],
  provider_unavailable: ["The provider cannot be reached", "Try again, or choose another model."],
  provider_rejected: ["The provider refused the request", "Change the message or the model."],
  provider_truncated: ["The answer broke off", "What is here is kept. You can go on from it."],
  provider_protocol: ["The provider answered in a way that was not understood", "Try again, or choose another model."],
  stalled: ["The provider went silent", "What is here is kept. You can go on from it."],
  deadline_exceeded: ["The answer took too long", "You can go on from what is here."],
  repetition: ["The model was going round in circles", "It was stopped so that it costs no more. Try again, or another model."],
  too_long: ["The answer became too long", "Ask for less at a time."],
  overloaded: ["The server is busy", "Try again in a moment."],
  draining: ["The server is restarting", "Try again in a moment."],
  store_unavailable: ["The server could not save", "Its disk may be full. Try again when it is not."],
  rate_limited: ["Too many requests", "Try again in a moment."],
  not_found: ["It is not there any more", ""],
  invalid_request: ["The server refused the request", ""],
  too_large: ["That is too much at once", ""],
  offline: ["Not connected", "Check the connection and send it again."],
};

function errorCard(error, ...buttons) {
  const [title, advice] = TROUBLES[error.code] ?? ["Something went wrong", "Try again."];
  const shown = buttons.filter(Boolean);
  return make(
    "div",
    { class: "card error" },
    make("p", {}, make("strong", {}, title)),
    make("p", {}, error.message),
    advice && make("p", { class: "soft" }, advice),
    shown.length > 0 && make("div", { class: "buttons" }, ...shown),
  );
}

class AnswerTurn extends Turn {
  constructor(message) {
    super(message, "answer");
    this.name = make("span", {});
    this.title = make("h2", { class: "who" }, icon("mark", "0 0 32 32"), make("span", { class: "hidden-text" }, "Answer from "), this.name);
    this.summary = make("span", {});
    this.thoughts = make("div", { class: "thoughts", tabIndex: 0, role: "region", "aria-label": "Thinking" });
    this.thinking = make("details", { class: "thinking", hidden: true }, make("summary", {}, icon("right"), this.summary), this.thoughts);
    this.prose = make("div", { class: "prose" });
    this.body = new AnswerBody(this.prose);
    this.tools = make("div", {});
    this.phase = make("div", { class: "phase" });
    this.card = make("div", {});
    this.element.append(this.title, this.thinking, this.prose, this.tools, this.phase, this.card, this.foot);
    this.reasoning = ""; // as it comes on this connection
    this.calls = [];
    this.connection = "open";
    this.notice = "";
  }

  // What the stream brings.

  begin() {
    this.reasoning = "";
    this.calls = [];
    this.body.begin();
    this.setConnection("open");
  }

  takeDelta({ kind, text }) {
    this.notice = "";
    if (kind === "reasoning") {
      this.reasoning += text;
      this.showReasoning(this.reasoning);
    } else if (kind === "tool_call") {
      this.calls.push(text);
      this.showCalls(this.calls);
    }
    this.drawPhase();
  }

  takeHtml({ settled, open }) {
    const wasEmpty = this.body.isEmpty;
    this.body.apply(settled, open);
    if (wasEmpty && !this.body.isEmpty) this.drawThinking();
    if (wasEmpty) this.drawPhase();
  }

  setConnection(connection) {
    if (this.connection === connection) return;
    this.connection = connection;
    this.drawPhase();
  }

  takeNotice({ code, attempt, delay_ms, error }) {
    const again = code === "retrying" ? `Trying again${delay_ms ? ` in ${seconds(delay_ms)}` : ""} (attempt ${attempt})` : "Trying the next model";
    this.notice = `${again}: ${error?.message ?? ""}`;
    this.drawPhase();
  }

  // What is drawn.

  get isRunning() {
    return this.message.status === "running";
  }

  draw() {
    const { message } = this;
    this.name.textContent = modelOf(message) || "answer";
    if (!this.isRunning) {
      if (message.html !== undefined) this.body.show(message.html);
      this.showReasoning(reasoningOf(message));
      this.showCalls(message.content.filter((part) => part.kind === "tool_call").map((part) => part.text));
      this.drawThinking();
    }
    this.element.setAttribute("aria-busy", String(this.isRunning));
    this.drawPhase();
    this.drawEnd();
  }

  showReasoning(text) {
    const node = this.thoughts.firstChild ?? this.thoughts.appendChild(document.createTextNode(""));
    if (text.length <= node.data.length) return; // a new connection begins at the beginning
    const isAtEnd = this.thoughts.scrollHeight - this.thoughts.scrollTop - this.thoughts.clientHeight < 24;
    node.appendData(text.slice(node.data.length));
    if (isAtEnd) this.thoughts.scrollTop = this.thoughts.scrollHeight;
    this.thinking.hidden = false;
    this.drawThinking();
  }

  drawThinking() {
    const { timing, created_at_ms } = this.message;
    const isLive = this.isRunning && this.body.isEmpty;
    const known = timing?.first_text_ms ?? (this.body.isEmpty ? timing?.total_ms : null);
    if (isLive) this.thoughtMs = Date.now() - created_at_ms;
    const ms = known ?? this.thoughtMs; // until the end, only who saw it happen knows
    const spent = Math.max(1, Math.round(ms / 1000));
    this.thinking.classList.toggle("live", isLive);
    this.summary.textContent = isLive ? `Thinking… ${spent} s` : ms ? `Thought for ${spent} s` : "Thought before answering";
  }

  showCalls(calls) {
    if (calls.length <= this.tools.childElementCount) return;
    const shown = calls.slice(this.tools.childElementCount).map((text) => {
      const call = JSON.parse(text);
      return make("details", { class: "tool" }, make("summary", {}, icon("right"), `Wants to call ${call.name}`), make("pre", { tabIndex: 0 }, call.arguments));
    });
    this.tools.append(...shown);
  }

  /** The line that says what is going on, while something is or after it ended early. */
  drawPhase() {
    const { message } = this;
    const isEmpty = this.body.isEmpty;
    this.prose.classList.toggle("growing", this.isRunning && this.connection === "open");
    const [text, isLate] = this.isRunning ? this.runningPhase(isEmpty) : [ENDINGS[message.status] ?? ENDINGS[message.finish_reason] ?? "", false];
    const parts = [];
    if (this.isRunning && text) parts.push(make("span", { class: "dots", "aria-hidden": "true" }, make("i"), make("i"), make("i")));
    if (text) parts.push(make("span", {}, text));
    if (!this.isRunning && this.canContinue && message.status !== "failed") parts.push(textButton("Continue", () => continueAnswer(message)));
    this.phase.hidden = parts.length === 0;
    this.phase.classList.toggle("late", isLate);
    if (this.phaseDrawn === text && parts.length === this.phase.childElementCount) return;
    this.phaseDrawn = text;
    this.phase.replaceChildren(...parts);
  }

  runningPhase(isEmpty) {
    const { message } = this;
    if (this.stopping) return ["Stopping…", false];
    if (message.id < 0) return ["Sending…", true];
    if (this.connection === "lost") return [navigator.onLine ? "Reconnecting… the answer goes on meanwhile." : "Offline. The answer goes on meanwhile.", true];
    if (this.notice) return [this.notice, false];
    if (!isEmpty || !this.thinking.hidden) return ["", false];
    const spent = Math.round((Date.now() - message.created_at_ms) / 1000);
    return [`Waiting for ${message.model ?? "the model"}${spent >= 3 ? ` · ${spent} s` : "…"}`, false];
  }

  /** Once a second while it runs. */
  tick() {
    this.drawThinking();
    this.drawPhase();
  }

  get canContinue() {
    const { status, finish_reason, error } = this.message;
    if (!this.place?.isLeaf || this.place.isBusy) return false;
    return status === "stopped" || status === "interrupted" || finish_reason === "length" || (status === "failed" && error?.retryable === true);
  }

  drawEnd() {
    const { message, place } = this;
    this.card.replaceChildren();
    this.foot.replaceChildren();
    if (this.isRunning) return this.foot.append(...[this.branches()].filter(Boolean));
    if (message.error) {
      const canGoOn = this.canContinue && !this.body.isEmpty;
      const goOn = canGoOn && textButton("Continue", () => continueAnswer(message), "primary");
      const again = !place.isBusy && textButton("Retry", () => regenerate(message), canGoOn ? "" : "primary");
      const other = !place.isBusy && textButton("Another model", (event) => this.regenerateWith(event.currentTarget));
      this.card.append(errorCard(message.error, goOn, again, other));
    }
    const actions = make("div", { class: "actions" });
    if (message.text) actions.append(this.copyButton("Copy answer as Markdown"));
    if (!message.error) {
      const swap = iconButton("Regenerate with another model", "swap", () => this.regenerateWith(swap), { disabled: place.isBusy, "aria-haspopup": "dialog" });
      actions.append(iconButton("Regenerate", "again", () => regenerate(message), { disabled: place.isBusy }), swap);
    }
    this.foot.append(actions, ...[this.branches()].filter(Boolean), this.figures());
  }

  regenerateWith(anchor) {
    openPicker(anchor, modelOf(this.message), (model) => regenerate(this.message, model));
  }

  /** The quiet line: tokens, tokens a second, time to the first delta. */
  figures() {
    const { usage, timing } = this.message;
    const parts = [];
    if (usage?.output_tokens) {
      const about = usage.estimated ? "≈ " : "";
      parts.push(`${about}${usage.output_tokens.toLocaleString("en")} tokens`);
      const ms = (timing?.total_ms ?? 0) - (timing?.first_delta_ms ?? 0);
      if (ms > 100) parts.push(`${about}${Math.round((usage.output_tokens / ms) * 1000)}/s`);
    }
    if (timing?.first_delta_ms) parts.push(`first after ${seconds(timing.first_delta_ms)}`);
    return make("span", { class: "figures" }, parts.join(" · "));
  }
}

// ── 7. The page's middle ─────────────────────────────────────────────────────────────────────────────────────────
//
// Scrolling: the view follows the answer only while it is at the bottom. Any scroll upward, by whatever means, lets
// go at once; coming back to the bottom, or the button, takes hold again. While a finger or a mouse button is down
// (a drag begins, text is being selected) nothing moves. Nothing else ever moves the view.

const scroller = $("scroller");
const scroll = {
  follows: true,
  isHeld: false,
  last: 0,
  distance: () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight,
  toEnd(behavior = "instant") {
    this.follows = true;
    scroller.scrollTo({ top: scroller.scrollHeight, behavior });
    this.show();
  },
  letGo() {
    this.follows = false;
    this.show();
  },
  onScroll() {
    if (scroller.scrollTop < this.last - 1 && this.distance() > 2) this.follows = false;
    else if (this.distance() < 24) this.follows = true;
    this.last = scroller.scrollTop;
    this.show();
  },
  show() {
    $("jump").hidden = this.follows || this.distance() < 48;
  },
  hold(isHeld) {
    this.isHeld = isHeld;
    if (!isHeld) this.grown();
  },
  grown() {
    if (this.follows && !this.isHeld) scroller.scrollTop = scroller.scrollHeight;
    this.last = scroller.scrollTop;
    this.show();
  },
};

function startScrolling() {
  scroller.addEventListener("scroll", () => scroll.onScroll(), { passive: true });
  scroller.addEventListener("wheel", (event) => event.deltaY < 0 && scroller.scrollTop > 0 && scroll.letGo(), { passive: true });
  scroller.addEventListener("keydown", (event) => ["PageUp", "ArrowUp", "Home"].includes(event.key) && scroller.scrollTop > 0 && scroll.letGo());
  for (const name of ["touchstart", "mousedown"]) scroller.addEventListener(name, () => scroll.hold(true), { passive: true });
  for (const name of ["touchend", "touchcancel", "mouseup", "blur"]) addEventListener(name, () => scroll.isHeld && scroll.hold(false), { passive: true });
  const watcher = new ResizeObserver(() => scroll.grown());
  watcher.observe($("turns"));
  watcher.observe(scroller);
  $("jump").onclick = () => scroll.toEnd(matchMedia("(prefers-reduced-motion: reduce)").matches ? "instant" : "smooth");
  $("turns").addEventListener("click", onCopyCode);
}

async function onCopyCode(event) {
  const button = event.target.closest("button.copy");
  if (!button) return;
  await copyText(button.closest("figure").querySelector("pre").textContent);
  button.textContent = "Copied";
  announce("Copied");
  setTimeout(() => (button.textContent = "Copy"), 1600);
}

let drawTimer = 0;

/** Draws the conversation that is shown, as far as it changed. */
function renderConversation() {
  const { conversation } = state;
  const children = conversation.children();
  const path = conversation.path(children);
  const isBusy = path.some((message) => message.status === "running");
  const last = path.at(-1);
  const elements = path.slice(-conversation.drawn).map((message) => {
    const siblings = children.get(message.parent_id);
    return turnOf(message).update({ siblings, index: siblings.indexOf(message), isLeaf: message === last, isBusy });
  });
  clearTimeout(drawTimer);
  if (conversation.drawn < path.length) drawTimer = setTimeout(() => drawMore(conversation));
  place($("turns"), conversation.loaded ? elements : [skeleton()]);
  const isEmpty = conversation.loaded && path.length === 0;
  document.body.classList.toggle("empty", isEmpty);
  $("empty").hidden = !isEmpty;
  $("title").textContent = conversation.title || "New conversation";
  $("conversation-menu").hidden = conversation.id === null;
  updateTitle();
  updateComposer();
}

function drawMore(conversation) {
  conversation.drawn += TURNS_AT_ONCE;
  if (conversation === state.conversation) renderConversation();
}

function skeleton() {
  const lines = ["60%", "92%", "85%", "40%"].map((width) => {
    const line = make("i", {});
    line.style.width = width;
    return line;
  });
  return make("div", { id: "skeleton", "aria-hidden": "true" }, ...lines);
}

function renderEmpty() {
  const trouble = state.providers.filter((one) => one.error).map((one) => make("li", {}, make("strong", {}, one.name), `: ${one.error}`));
  const keys = (state.unusableKeys ?? []).map((text) => make("li", {}, text));
  const isDemo = state.providers.length > 0 && state.providers.every((one) => one.name === "demo");
  $("empty").replaceChildren(
    icon("mark", "0 0 32 32"),
    make("h2", {}, "What would you like to know?"),
    ...(isDemo ? [demoCard()] : []),
    ...(trouble.length + keys.length ? [make("div", { class: "card notice" }, make("p", {}, make("strong", {}, "Not everything is connected")), make("ul", {}, ...trouble, ...keys))] : []),
  );
}

function demoCard() {
  const code = (text) => make("code", {}, text);
  return make(
    "p",
    {},
    "This is the built-in demo, which answers the same to everything. For a real model, set a key such as ",
    code("OPENAI_API_KEY"),
    " or an address such as ",
    code("OLLAMA_BASE_URL"),
    " and start llmchat again.",
  );
}

/** Shows a conversation: from the server, or an empty one. `found`: the message to scroll to. */
async function openConversation(id, found = null) {
  saveDraft();
  const conversation = new Conversation();
  Object.assign(conversation, { id, loaded: id === null });
  conversation.title = state.list.find((one) => one.id === id)?.title ?? "";
  state.conversation = conversation;
  state.unread.delete(id);
  closeDrawer();
  renderConversation();
  loadDraft();
  renderList();
  syncStream();
  if (!isTouch.matches && !found) $("box").focus({ preventScroll: true });
  if (id !== null) await loadConversation(conversation, found);
}

async function loadConversation(conversation, found = null) {
  const askedAt = performance.now();
  let data;
  try {
    data = await api("GET", `/api/v1/conversations/${conversation.id}?render=html`);
  } catch (error) {
    if (conversation === state.conversation && !conversation.messages.size) showLoadError(conversation, error);
    return;
  }
  conversation.adopt(data, askedAt);
  if (conversation !== state.conversation) return;
  if (found) {
    conversation.reveal(found);
    conversation.drawn = Infinity;
  }
  renderConversation();
  followModel();
  syncStream();
  if (found) showFound(found);
  else scroll.grown();
}

function showLoadError(conversation, error) {
  const again = textButton("Try again", () => loadConversation(conversation), "primary");
  const fresh = textButton("New conversation", () => go("/"));
  place($("turns"), [errorCard(error, error.status !== 404 && again, fresh)]);
}

function showFound(id) {
  const message = state.conversation.messages.get(id);
  const element = message && turnOf(message).element;
  if (!element?.isConnected) return scroll.toEnd();
  scroll.letGo();
  element.scrollIntoView({ block: "center" });
  element.classList.add("found");
  setTimeout(() => element.classList.remove("found"), 2500);
}

/** The page's title: what is shown, and whether an answer came while nobody looked. */
function updateTitle() {
  if (document.visibilityState === "visible") state.finishedHidden = false;
  const title = state.conversation?.title;
  document.title = (state.finishedHidden ? "✓ " : "") + (title ? `${title} · llmchat` : "llmchat");
}

// ── 8. Answers and their stream ──────────────────────────────────────────────────────────────────────────────────
//
// An answer is started in the background and then looked at; so a lost connection, a reload or another device are all
// the same case. The browser's own reconnecting is not used: it gives up for good on an HTTP error, and it does not
// notice a dead line. Silence for 40 s (a heartbeat comes every 15) counts as one.

const SILENCE_MS = 40_000;
const BACKOFF_MS_MAX = 15_000;

class AnswerStream {
  constructor(message) {
    this.message = message;
    this.turn = turnOf(message);
    this.failures = 0;
    this.timer = 0;
    this.watch = setInterval(() => this.look(), 1000);
    this.open();
  }

  open() {
    clearTimeout(this.timer);
    this.source?.close();
    this.seenAt = Date.now();
    const source = (this.source = new EventSource(`/api/v1/messages/${this.message.id}/stream?render=html`));
    const on = (name, take) =>
      source.addEventListener(name, (event) => {
        if (source !== this.source) return;
        this.seenAt = Date.now();
        take(event.data ? JSON.parse(event.data) : {});
      });
    on("start", (data) => this.onStart(data));
    on("delta", (data) => this.turn.takeDelta(data));
    on("html", (data) => this.turn.takeHtml(data));
    on("notice", (data) => this.turn.takeNotice(data));
    on("heartbeat", () => {});
    on("end", (data) => this.onEnd(data));
    source.onerror = () => source === this.source && this.onError();
  }

  close() {
    clearTimeout(this.timer);
    clearInterval(this.watch);
    this.source.close();
    this.source = null;
  }

  onStart(data) {
    this.failures = 0;
    setLost(false);
    Object.assign(this.message, { provider: data.provider, model: data.model });
    this.turn.name.textContent = modelOf(this.message);
    this.turn.begin();
  }

  onEnd(data) {
    this.close();
    if (state.stream === this) state.stream = null;
    finishAnswer(this.message, data);
  }

  onError() {
    this.source.close();
    this.failures += 1;
    this.turn.setConnection("lost");
    const backoff = Math.min(BACKOFF_MS_MAX, 250 * 2 ** this.failures) * (0.75 + Math.random() / 2);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.retry(), backoff);
  }

  /** An EventSource does not say why it failed; a plain request does, and brings the answer if it has ended. */
  async retry() {
    if (this.failures > 1) {
      try {
        await refreshMessage(this.message);
      } catch (error) {
        if (this.source && error.status === 404) return openConversation(state.conversation.id);
        if (this.source && error.code === "offline") return this.onError();
      }
    }
    if (this.source) this.open();
  }

  /** At once, because something says that it may work now. */
  reopen() {
    this.failures = 0;
    this.open();
  }

  look() {
    this.turn.tick();
    if (Date.now() - this.seenAt > SILENCE_MS && this.source.readyState !== EventSource.CLOSED) {
      this.turn.setConnection("lost");
      this.reopen();
    }
  }
}

/** Holds the stream that ought to be open, and no other. */
function syncStream() {
  const isVisible = document.visibilityState === "visible";
  const running = isVisible ? state.conversation.running() : null;
  const wanted = running && running.id > 0 ? running : null;
  if (state.stream?.message !== wanted) {
    state.stream?.close();
    state.stream = wanted && new AnswerStream(wanted);
  }
  schedulePoll();
}

async function finishAnswer(message, { status, finish_reason, usage, timing, error }) {
  Object.assign(message, { status, finish_reason, usage, timing, error, changedAt: performance.now() });
  const turn = turnOf(message);
  turn.stopping = false;
  turn.drawThinking();
  if (state.conversation.messages.get(message.id) === message) renderConversation();
  announce({ completed: "Answer finished", stopped: "Answer stopped" }[status] ?? "Answer failed");
  await refreshMessage(message).catch(() => {});
  refreshList();
}

/** The message as the server has it, its text among it; nothing, if it has ended or gone on since that was asked. */
async function refreshMessage(message) {
  const askedAt = performance.now();
  const data = await api("GET", `/api/v1/messages/${message.id}?render=html`);
  if (message.changedAt > askedAt) return;
  const wasRunning = message.status === "running";
  Object.assign(message, data);
  if (state.conversation.messages.get(message.id) !== message) return;
  renderConversation();
  if (wasRunning && data.status !== "running") syncStream();
}

/** Shows new messages at once and asks for the answer; takes them back if that fails. Returns the error, or null. */
async function startAnswer(conversation, path, body, added, key = newKey()) {
  const answer = added.at(-1);
  if (conversation === state.conversation) {
    renderConversation();
    scroll.toEnd();
  }
  try {
    const started = await askTwice(path, { ...body, background: true }, key);
    if (added.length === 2) conversation.settle(added[0], started.parent_id);
    if (added.length === 2) added[0].status = "completed";
    conversation.settle(answer, started.message_id);
    conversation.ours = true;
    await nameConversation(conversation, started.conversation_id);
    return null;
  } catch (error) {
    for (const message of added) conversation.remove(message);
    return error;
  } finally {
    if (conversation === state.conversation) {
      renderConversation();
      syncStream();
    }
    if (turnOf(answer).stopping && answer.id > 0) stopAnswer(answer);
    refreshList();
  }
}

/** A request whose answer is lost is sent once more under the same key: it is done only once. */
async function askTwice(path, body, key) {
  try {
    return await api("POST", path, body, { key });
  } catch (error) {
    if (error.code !== "offline" || !navigator.onLine) throw error;
  }
  await wait(800);
  return api("POST", path, body, { key });
}

/** A conversation that just got its id: its address, and the settings that were made before. */
async function nameConversation(conversation, id) {
  if (conversation.id !== null) return;
  conversation.id = id;
  conversation.title ||= textOf([...conversation.messages.values()][0]).trim().split("\n")[0].slice(0, 60);
  if (conversation === state.conversation) history.replaceState(null, "", `/c/${id}`);
  if (conversation.parameters.temperature !== undefined) {
    await api("PATCH", `/api/v1/conversations/${id}`, { temperature: conversation.parameters.temperature }).catch(() => {});
  }
}

async function regenerate(message, model = "") {
  const { conversation } = state;
  const [provider, ...name] = (model || modelOf(message)).split("/");
  const answer = conversation.add({ role: "assistant", parent_id: message.parent_id, provider, model: name.join("/") });
  const error = await startAnswer(conversation, `/api/v1/messages/${message.id}/regenerate`, model ? { model } : {}, [answer]);
  if (error) toast(`Not regenerated: ${error.message}`, "Retry", () => regenerate(message, model));
}

async function continueAnswer(message) {
  const before = { status: message.status, finish_reason: message.finish_reason, error: message.error };
  Object.assign(message, { status: "running", finish_reason: null, error: null, changedAt: performance.now() });
  renderConversation();
  try {
    await api("POST", `/api/v1/messages/${message.id}/continue`, { background: true });
  } catch (error) {
    Object.assign(message, before);
    toast(`Not continued: ${error.message}`, "Retry", () => continueAnswer(message));
  }
  renderConversation();
  syncStream();
  refreshList();
}

async function stopAnswer(message = state.conversation.running()) {
  if (!message) return;
  const turn = turnOf(message);
  turn.stopping = true;
  turn.drawPhase();
  updateComposer();
  if (message.id < 0) return; // stopped as soon as it has an id
  try {
    await api("POST", `/api/v1/messages/${message.id}/stop`, undefined, { timeout: 15_000 });
    if (message.status === "running") await refreshMessage(message);
  } catch (error) {
    toast(`Not stopped: ${error.message}`, "Retry", () => stopAnswer(message));
  }
  turn.stopping = false;
  turn.drawPhase();
  updateComposer();
}

// ── 9. Composer ──────────────────────────────────────────────────────────────────────────────────────────────────
//
// Drafts belong to a conversation. A message that could not be sent is in the box again, or in its conversation's
// draft if another one is shown by then; sent unchanged it goes out under the same key, so it is never paid twice. While
// it is on its way it is part of the draft: this page may be left before the answer comes, for one to sign in.

const IMAGE_BYTES_MAX = 10_000_000;
const IMAGES_BYTES_MAX = 14_000_000; // a request has 20 MB, and base64 takes a third more
const IMAGE_TYPES = ["image/png", "image/jpeg", "image/gif", "image/webp"];
const box = $("box");
let unsent = { key: "", body: "" };

const draftName = () => `draft.${state.conversation?.id ?? "new"}`;
const underway = new Map(); // by draft name: the text that is being sent

function saveDraft() {
  if (!state.conversation) return;
  const text = [underway.get(draftName()), box.value].filter(Boolean).join("\n");
  memory.set(draftName(), text);
}

function loadDraft() {
  setBox(underway.has(draftName()) ? "" : memory.get(draftName()) ?? "");
  state.images = [];
  renderImages();
  $("not-sent").hidden = true;
}

function setBox(text) {
  box.value = text;
  fit(box);
  updateComposer();
}

/** Grows a text box with its text, where CSS cannot. */
function fit(area) {
  if (CSS.supports("field-sizing", "content")) return;
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}

function updateComposer() {
  const running = state.conversation.running();
  $("stop").hidden = !running;
  $("stop").setAttribute("aria-busy", String(Boolean(running && turnOf(running).stopping)));
  $("send").hidden = Boolean(running);
  const isEmpty = !box.value.trim() && !state.images.length;
  $("send").disabled = isEmpty || !state.conversation.loaded;
  $("hint").textContent = running ? "Esc stops the answer" : isEmpty ? "" : "Enter sends · Shift + Enter makes a new line";
}

/** Enter sends, but not while an input method composes (229: Safari says it that way), nor on a touch screen. */
function sendsOnEnter(event) {
  if (event.key !== "Enter" || event.isComposing || event.keyCode === 229) return false;
  if (event.ctrlKey || event.metaKey) return true;
  return !event.shiftKey && !event.altKey && !isTouch.matches;
}

function partsOf(text, images) {
  if (!images.length) return text;
  return [...images.map((data) => ({ type: "image", data })), ...(text.trim() ? [{ type: "text", text }] : [])];
}

function addQuestion(conversation, parentId, text, images) {
  const content = images.map((url) => {
    const [, media_type, data] = url.match(/^data:([^;]+);base64,(.*)$/s);
    return { kind: "image", text: JSON.stringify({ media_type, data }) };
  });
  if (text.trim()) content.push({ kind: "text", text });
  const question = conversation.add({ role: "user", parent_id: parentId, text, content, status: "sending" });
  const [provider, ...name] = chosenModel().split("/");
  const answer = conversation.add({ role: "assistant", parent_id: question.id, provider, model: name.join("/") });
  return [question, answer];
}

function bodyOf(conversation, parentId, text, images) {
  const body = { message: partsOf(text, images) };
  if (state.model) body.model = state.model;
  if (conversation.id !== null) Object.assign(body, { conversation_id: conversation.id, parent_id: parentId });
  else if (conversation.system) body.system = conversation.system;
  if (conversation.id === null && conversation.parameters.temperature != null) body.temperature = conversation.parameters.temperature;
  return body;
}

async function send() {
  const { conversation } = state;
  const text = box.value;
  const images = state.images;
  if (conversation.running() || !conversation.loaded || (!text.trim() && !images.length)) return;
  const parentId = conversation.path().at(-1)?.id ?? null;
  const body = bodyOf(conversation, parentId, text, images.map((image) => image.url));
  const encoded = JSON.stringify(body);
  if (unsent.body !== encoded) unsent = { key: newKey(), body: encoded };
  $("not-sent").hidden = true;
  const name = draftName();
  const added = addQuestion(conversation, parentId, text, images.map((image) => image.url));
  state.images = [];
  underway.set(name, text);
  setBox("");
  renderImages();
  const error = await startAnswer(conversation, "/api/v1/chat", body, added, unsent.key);
  underway.delete(name);
  if (!error) return memory.set(name, name === draftName() ? box.value : "");
  if (conversation !== state.conversation) {
    memory.set(name, text);
    return toast(`Not sent: ${error.message} The text is kept as a draft.`);
  }
  state.images = [...images, ...state.images];
  setBox(text + (box.value ? `\n${box.value}` : ""));
  renderImages();
  saveDraft();
  $("not-sent").replaceChildren(errorCard(error));
  $("not-sent").hidden = false;
  box.focus();
}

/** The edited message becomes a sibling of the old one. */
async function sendEdited(message, text) {
  const { conversation } = state;
  const images = imagesOf(message);
  const body = bodyOf(conversation, message.parent_id, text, images);
  const chosen = conversation.choices.get(message.parent_id);
  const error = await startAnswer(conversation, "/api/v1/chat", body, addQuestion(conversation, message.parent_id, text, images));
  if (!error) return box.focus();
  conversation.choices.set(message.parent_id, chosen ?? message.id);
  renderConversation();
  toast(`Not sent: ${error.message}`);
  const turn = turnOf(message);
  turn.edit();
  turn.editor.querySelector("textarea").value = text;
}

function renderImages() {
  const items = state.images.map((image, index) => {
    const remove = () => {
      state.images = state.images.toSpliced(index, 1);
      renderImages();
    };
    const button = make("button", { type: "button", "aria-label": `Remove ${image.name}`, onclick: remove }, icon("x"));
    return make("li", {}, make("img", { src: image.url, alt: image.name }), button);
  });
  $("attachments").replaceChildren(...items);
  $("attachments").hidden = items.length === 0;
  updateComposer();
}

function readAsDataUrl(file) {
  return new Promise((done, fail) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => fail(reader.error);
    reader.readAsDataURL(file);
  });
}

async function addImages(files) {
  const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
  for (const file of files) {
    const total = state.images.reduce((sum, image) => sum + image.bytes, file.size);
    if (!IMAGE_TYPES.includes(file.type)) toast(`${file.name} is no PNG, JPEG, GIF or WebP image.`);
    else if (file.size > IMAGE_BYTES_MAX) toast(`${file.name} has ${megabytes(file.size)}; an image may have ${megabytes(IMAGE_BYTES_MAX)}.`);
    else if (total > IMAGES_BYTES_MAX) toast(`With ${file.name} the images have ${megabytes(total)}; together they may have ${megabytes(IMAGES_BYTES_MAX)}.`);
    else state.images.push({ name: file.name || "image", bytes: file.size, url: await readAsDataUrl(file) });
  }
  renderImages();
}

function startComposer() {
  let timer = 0;
  box.addEventListener("input", () => {
    fit(box);
    updateComposer();
    clearTimeout(timer);
    timer = setTimeout(saveDraft, 250);
  });
  box.addEventListener("keydown", (event) => {
    if (sendsOnEnter(event)) {
      event.preventDefault();
      send();
    }
  });
  box.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (files.length) event.preventDefault();
    addImages(files);
  });
  $("composer").onsubmit = (event) => (event.preventDefault(), send());
  $("stop").onclick = () => stopAnswer();
  $("attach").onclick = () => $("files").click();
  $("files").onchange = () => addImages([...$("files").files]).then(() => ($("files").value = ""));
  startDropping();
}

function startDropping() {
  const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  const mark = (isOn) => box.parentElement.classList.toggle("dropping", isOn);
  addEventListener("dragover", (event) => hasFiles(event) && (event.preventDefault(), mark(true)));
  addEventListener("dragleave", (event) => event.relatedTarget === null && mark(false));
  addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    mark(false);
    addImages([...event.dataTransfer.files]);
  });
}

// ── 10. Sidebar ──────────────────────────────────────────────────────────────────────────────────────────────────

const items = new Map(); // conversation id → list item
const groups = new Map(); // "Today", "Yesterday" … → [heading, list]

function renderList() {
  if (state.found) return renderFound();
  const entries = new Map();
  for (const one of state.list) {
    if (state.deleting.has(one.id)) continue;
    const name = groupOf(one.updated_at_ms);
    if (!entries.has(name)) entries.set(name, []);
    entries.get(name).push(itemOf(one));
  }
  const nodes = [];
  for (const [name, group] of entries) {
    if (!groups.has(name)) groups.set(name, [make("h2", {}, name), make("ul", {})]);
    place(groups.get(name)[1], group);
    nodes.push(...groups.get(name));
  }
  if (!nodes.length) nodes.push(make("p", { class: "quiet" }, "Your conversations will be listed here."));
  if (state.before) nodes.push(make("button", { type: "button", class: "older", onclick: loadOlder }, "Show older"));
  place($("list"), nodes);
}

function groupOf(ms) {
  const day = new Date().setHours(0, 0, 0, 0);
  if (ms >= day) return "Today";
  if (ms >= day - 86_400_000) return "Yesterday";
  if (ms >= day - 6 * 86_400_000) return "This week";
  return new Date(ms).toLocaleDateString("en", { month: "long", year: "numeric" });
}

/** A conversation in the list; the element is kept, so that focus and an open menu survive a refresh. */
function itemOf(one) {
  let item = items.get(one.id);
  if (!item) {
    item = make("li", {}, make("a", { href: `/c/${one.id}` }, make("span", { class: "name" }), make("span", { class: "dot" })));
    item.append(iconButton(`Menu`, "more", (event) => openMenu(event.currentTarget, conversationMenu(one.id)), { "aria-haspopup": "menu" }));
    items.set(one.id, item);
  }
  if (item.querySelector("input")) return item;
  const isCurrent = one.id === state.conversation?.id;
  const mark = one.running ? "running" : state.unread.has(one.id) ? "unread" : "";
  item.className = `item ${mark}${isCurrent ? " current" : ""}`;
  const [link, button] = item.children;
  const [name, dot] = link.children;
  name.textContent = link.title = one.title;
  dot.hidden = !mark;
  dot.textContent = "";
  if (mark) dot.append(make("span", { class: "hidden-text" }, mark === "running" ? "is being answered" : "has a new answer"));
  button.setAttribute("aria-label", `Menu of ${one.title}`);
  if (isCurrent) link.setAttribute("aria-current", "page");
  else link.removeAttribute("aria-current");
  return item;
}

function renderFound() {
  const results = state.found.filter((one) => !state.deleting.has(one.id)).map((one) => {
    const snippet = one.match?.message_id ? one.match.snippet.map((part) => (part.mark ? make("mark", {}, part.text) : part.text)) : [];
    const link = make("a", { href: `/c/${one.id}` }, make("span", { class: "name" }, one.title));
    if (snippet.length) link.append(make("span", { class: "snippet" }, ...snippet));
    if (one.match?.message_id) link.dataset.found = one.match.message_id;
    return make("li", { class: "item result" }, link);
  });
  const nothing = make("p", { class: "quiet" }, "Nothing was found.");
  $("list").replaceChildren(make("h2", {}, results.length ? "Found" : "Search"), results.length ? make("ul", {}, ...results) : nothing);
}

async function loadOlder() {
  const data = await api("GET", `/api/v1/conversations?before=${encodeURIComponent(state.before)}`);
  const known = new Set(state.list.map((one) => one.id));
  state.list.push(...data.conversations.filter((one) => !known.has(one.id)));
  state.before = data.next_before;
  renderList();
}

/** The list's first part anew; what finished in the meantime is marked. */
async function refreshList() {
  const data = await api("GET", "/api/v1/conversations").catch(() => null);
  if (!data) return schedulePoll();
  const fresh = new Map(data.conversations.map((one) => [one.id, one]));
  for (const old of state.list) if (old.running && fresh.get(old.id)?.running === false) noteFinished(old);
  const oldest = data.next_before ? (data.conversations.at(-1)?.updated_at_ms ?? 0) : -1;
  const older = state.list.filter((one) => !fresh.has(one.id) && one.updated_at_ms <= oldest && data.next_before);
  state.list = [...data.conversations, ...older];
  if (!older.length) state.before = data.next_before;
  catchUp(fresh.get(state.conversation.id));
  renderList();
  schedulePoll();
}

function noteFinished(one) {
  const isShown = one.id === state.conversation.id;
  const isHidden = document.visibilityState !== "visible";
  if (!isShown) state.unread.add(one.id);
  if (isHidden) state.finishedHidden = true;
  if (isHidden || !isShown) announce("Answer finished");
  updateTitle();
}

/** The shown conversation changed elsewhere: takes the change over. */
function catchUp(summary) {
  const { conversation } = state;
  if (!summary || !conversation.loaded) return;
  if (conversation.title !== summary.title) {
    conversation.title = summary.title;
    $("title").textContent = summary.title;
    updateTitle();
  }
  const isChanged = summary.updated_at_ms !== conversation.updated_at_ms && !conversation.ours;
  conversation.updated_at_ms = summary.updated_at_ms;
  conversation.ours = false;
  const isMissing = summary.running && !conversation.running();
  if ((isChanged || isMissing) && document.visibilityState === "visible") loadConversation(conversation);
}

const conversationMenu = (id) => [
  ["pencil", "Rename", () => rename(id)],
  ["download", "Export Markdown", `/api/v1/conversations/${id}/export?format=markdown`],
  ["download", "Export JSON", `/api/v1/conversations/${id}/export?format=json`],
  ["trash", "Delete", () => remove(id)],
];

function rename(id) {
  const one = state.list.find((entry) => entry.id === id);
  const item = items.get(id);
  if (!one || !item) return;
  openDrawer();
  const input = make("input", { value: one.title, "aria-label": "Title", maxLength: 200 });
  const parts = [...item.children];
  let isDone = false;
  const finish = async (isKept) => {
    if (isDone) return;
    isDone = true;
    item.replaceChildren(...parts);
    const title = input.value.trim();
    if (isKept && title && title !== one.title) await setTitle(id, title);
    renderList();
    parts[0].focus();
  };
  input.onkeydown = (event) => {
    event.stopPropagation();
    if (event.key === "Enter" && !event.isComposing && event.keyCode !== 229) finish(true);
    if (event.key === "Escape") finish(false);
  };
  input.onblur = () => finish(true);
  item.replaceChildren(input);
  input.select();
}

async function setTitle(id, title) {
  try {
    const summary = await api("PATCH", `/api/v1/conversations/${id}`, { title });
    Object.assign(state.list.find((one) => one.id === id) ?? {}, { title: summary.title });
    if (state.conversation.id === id) state.conversation.title = summary.title;
    renderConversation();
  } catch (error) {
    toast(`Not renamed: ${error.message}`);
  }
}

/** Deletes in a few seconds, unless that is undone; leaving the page does it at once. */
function remove(id) {
  const one = state.list.find((entry) => entry.id === id);
  if (state.conversation.id === id) go("/");
  const timer = setTimeout(() => finishDeleting(id), 6000);
  const leave = toast(`Deleted “${one?.title ?? "conversation"}”`, "Undo", () => {
    clearTimeout(timer);
    state.deleting.delete(id);
    renderList();
  });
  state.deleting.set(id, { timer, leave });
  renderList();
}

async function finishDeleting(id, options = {}) {
  clearTimeout(state.deleting.get(id)?.timer);
  state.deleting.get(id)?.leave();
  try {
    await api("DELETE", `/api/v1/conversations/${id}`, undefined, options);
    memory.set(`draft.${id}`, "");
    state.list = state.list.filter((one) => one.id !== id);
    items.delete(id);
  } catch (error) {
    if (error.status !== 404) toast(`Not deleted: ${error.message}`);
  }
  state.deleting.delete(id);
  renderList();
}

let searches = 0;

async function runSearch() {
  const query = $("search").value.trim();
  const number = ++searches;
  if (!query) {
    state.found = null;
    return renderList();
  }
  await wait(150);
  if (number !== searches) return;
  const data = await api("GET", `/api/v1/conversations?query=${encodeURIComponent(query)}`).catch(() => null);
  if (number !== searches) return;
  state.found = data?.conversations ?? [];
  renderFound();
}

function endSearch() {
  $("search").value = "";
  runSearch();
}

/** Up and down go through the links of the list. */
function moveInList(event) {
  const links = [...$("list").querySelectorAll("a")];
  const at = links.indexOf(document.activeElement);
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step || (at < 0 && document.activeElement !== $("search"))) return;
  event.preventDefault();
  (links[at + step] ?? (step < 0 ? $("search") : links[at]))?.focus();
}

function openDrawer() {
  if (isNarrow.matches) document.body.classList.add("drawer");
  else setWide(false);
  updateDrawer();
}

function closeDrawer() {
  document.body.classList.remove("drawer");
  updateDrawer();
}

/** While the drawer is open, what lies under it cannot be reached. */
function updateDrawer() {
  const isOpen = document.body.classList.contains("drawer");
  $("page").inert = isOpen;
  $("sidebar").inert = isNarrow.matches ? !isOpen : document.body.classList.contains("wide");
}

function setWide(isWide) {
  document.body.classList.toggle("wide", isWide);
  memory.set("wide", isWide ? "1" : "");
  updateDrawer();
}

function startSidebar() {
  document.body.classList.toggle("wide", memory.get("wide") === "1");
  updateDrawer();
  isNarrow.addEventListener("change", closeDrawer);
  $("show-sidebar").onclick = () => (openDrawer(), isNarrow.matches && $("hide-sidebar").focus());
  $("hide-sidebar").onclick = () => {
    if (isNarrow.matches) closeDrawer();
    else setWide(true);
    $("show-sidebar").focus();
  };
  $("backdrop").onclick = closeDrawer;
  $("search").oninput = runSearch;
  $("search").onkeydown = (event) => {
    if (event.key === "Escape") (event.preventDefault(), event.stopPropagation(), endSearch(), closeDrawer(), box.focus());
    if (event.key === "Enter" && !event.isComposing) $("list").querySelector("a")?.click();
  };
  $("sidebar").addEventListener("keydown", moveInList);
  $("search-key").textContent = isApple ? "⌘ K" : "Ctrl K";
  $("conversation-menu").onclick = (event) => openMenu(event.currentTarget, conversationMenu(state.conversation.id));
}

// ── 11. Menu and picker ──────────────────────────────────────────────────────────────────────────────────────────

/** Opens a popover by the element that it belongs to: below it if there is room, else above. */
function openPopover(popover, anchor) {
  popover.showPopover();
  const at = anchor.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = popover;
  const isBelow = at.bottom + height + 12 < innerHeight || at.top < height + 12;
  const left = Math.max(8, Math.min(at.left, innerWidth - width - 8));
  const top = isBelow ? `${Math.max(8, Math.min(at.bottom + 6, innerHeight - height - 8))}px` : "auto";
  const bottom = isBelow ? "auto" : `${innerHeight - at.top + 6}px`; // it stays by its element when it shrinks
  Object.assign(popover.style, { left: `${left}px`, top, bottom });
  anchor.setAttribute("aria-expanded", "true");
  popover.onbeforetoggle = (event) => {
    if (event.newState === "closed") anchor.setAttribute("aria-expanded", "false");
  };
}

/** `entries`: [icon, label, function or address]. */
function openMenu(anchor, entries) {
  const menu = $("menu");
  const nodes = entries.map(([name, label, act]) => {
    const isLink = typeof act === "string";
    const node = make(isLink ? "a" : "button", { role: "menuitem", tabIndex: -1, class: name === "trash" ? "danger" : "" }, icon(name), label);
    if (isLink) Object.assign(node, { href: act, download: "" });
    node.onclick = () => {
      menu.hidePopover();
      if (!isLink) act();
    };
    return node;
  });
  menu.replaceChildren(...nodes);
  menu.onkeydown = (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    nodes[(nodes.indexOf(document.activeElement) + step + nodes.length) % nodes.length].focus();
  };
  openPopover(menu, anchor);
  nodes[0].focus();
}

/** The model that a new answer is asked of, as far as is known. */
const chosenModel = () => state.model || state.defaultModel || "";

function chooseModel(model) {
  state.model = model;
  memory.set("model", model);
  renderModel();
}

function renderModel() {
  $("model-name").textContent = chosenModel() || "Default model";
  $("model").setAttribute("aria-label", `Model: ${chosenModel() || "the default"}`);
}

/** A conversation goes on with the model that it had last. */
function followModel() {
  const last = state.conversation.path().findLast((message) => message.role === "assistant" && message.model);
  if (last) state.model = modelOf(last);
  renderModel();
}

async function loadModels() {
  const help = await api("GET", "/api/v1/help").catch(() => null);
  if (!help) return;
  Object.assign(state, { providers: help.providers, defaultModel: help.default_model, unusableKeys: help.unusable_keys });
  $("sign-out").hidden = !help.token_needed;
  renderModel();
  renderEmpty();
}

/** Every word of the search is in the name; a name that nobody lists can be asked for all the same. */
function findModels(query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const groups = state.providers.map((provider) => ({
    name: provider.name,
    error: words.length ? "" : provider.error,
    models: provider.models.map((model) => `${provider.name}/${model}`).filter((name) => words.every((word) => name.toLowerCase().includes(word))),
  }));
  const provider = query.split("/")[0];
  if (query.includes("/") && state.providers.some((one) => one.name === provider) && !groups.some((group) => group.models.includes(query.trim()))) {
    groups.push({ name: "Not in the list", models: [query.trim()] });
  }
  return groups.filter((group) => group.models.length || group.error);
}

function openPicker(anchor, current, choose) {
  const search = $("picker-search");
  let options = [];
  let active = 0;
  const pick = (model) => {
    $("picker").hidePopover();
    anchor.focus();
    choose(model);
  };
  const activate = (index) => {
    if (!options.length) return search.removeAttribute("aria-activedescendant");
    options[active]?.classList.remove("active");
    active = (index + options.length) % options.length;
    options[active].classList.add("active");
    options[active].scrollIntoView({ block: "nearest" });
    search.setAttribute("aria-activedescendant", options[active].id);
  };
  const draw = () => {
    options = [];
    $("picker-list").replaceChildren(...findModels(search.value).map((group) => modelGroup(group, current, options, pick)));
    if (!options.length) $("picker-list").append(make("p", { class: "quiet" }, state.providers.length ? "No model has that name." : "Asking the providers for their models…"));
    activate(Math.max(0, options.findIndex((option) => option.dataset.model === current)));
  };
  search.value = "";
  search.oninput = draw;
  search.onkeydown = (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) activate(active + step);
    else if (event.key === "Enter" && !event.isComposing && options[active]) pick(options[active].dataset.model);
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  draw();
  openPopover($("picker"), anchor);
  activate(active);
  search.focus();
  if (!state.providers.length) loadModels().then(draw);
}

function startPicker() {
  $("model").onclick = () => openPicker($("model"), chosenModel(), chooseModel);
  renderModel();
}

function modelGroup(group, current, options, pick) {
  const nodes = group.models.map((model) => {
    const isCurrent = model === current;
    const option = make("div", { class: "option", role: "option", id: `option-${options.length}`, "aria-selected": String(isCurrent), onclick: () => pick(model) });
    option.dataset.model = model;
    option.append(model.slice(model.indexOf("/") + 1), ...(isCurrent ? [icon("check")] : []));
    options.push(option);
    return option;
  });
  const title = make("div", { class: "group", "aria-hidden": "true" }, group.name);
  return make("div", { role: "group", "aria-label": group.name }, title, ...(group.error ? [make("div", { class: "trouble" }, group.error)] : []), ...nodes);
}

// ── 12. Settings ─────────────────────────────────────────────────────────────────────────────────────────────────

const KEYS = [
  ["Enter", "send"],
  ["Shift Enter", "a new line"],
  ["Esc", "stop the answer"],
  ["↑", "edit your last message (in an empty box)"],
  [`${isApple ? "⌘" : "Ctrl"} K`, "search"],
  [`${isApple ? "⌘" : "Ctrl"} Shift O`, "new conversation"],
];

function openSettings() {
  const { conversation } = state;
  const temperature = conversation.parameters.temperature;
  $("system").value = conversation.system;
  $("temperature").value = temperature ?? 1;
  showTemperature(temperature);
  $("settings-scope").textContent = conversation.id === null ? "The new conversation" : "This conversation";
  $("export").hidden = conversation.id === null;
  $("export-markdown").href = `/api/v1/conversations/${conversation.id}/export?format=markdown`;
  $("export-json").href = `/api/v1/conversations/${conversation.id}/export?format=json`;
  $("settings").showModal();
}

function showTemperature(value) {
  $("temperature-shown").textContent = value == null ? "the provider’s default" : Number(value).toFixed(1);
  $("temperature-default").hidden = value == null;
  $("temperature").classList.toggle("unset", value == null);
}

/** Sets something of the conversation; a new one is told with its first message. */
async function changeConversation(changes) {
  const { conversation } = state;
  if ("system" in changes) conversation.system = changes.system;
  if ("temperature" in changes) conversation.parameters = { ...conversation.parameters, temperature: changes.temperature ?? undefined };
  if (conversation.id === null) return;
  try {
    await api("PATCH", `/api/v1/conversations/${conversation.id}`, changes);
  } catch (error) {
    toast(`Not saved: ${error.message}`, "Retry", () => changeConversation(changes));
  }
}

function setTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  memory.set("theme", theme === "system" ? "" : theme);
  const [light, dark] = document.querySelectorAll("meta[name=theme-color]");
  light.media = { system: "(prefers-color-scheme: light)", light: "all", dark: "not all" }[theme];
  dark.media = { system: "(prefers-color-scheme: dark)", light: "not all", dark: "all" }[theme];
}

const IMPORT_MS = 3_600_000; // a gigabyte may take its time

/** Brings in an export, JSON or the zip that ChatGPT and Claude hand out, and says what came in and what did not. */
async function importFile(file) {
  const type = /\.zip$/i.test(file.name) || file.type.includes("zip") ? "application/zip" : "application/json";
  $("settings").close(); // what is said next would lie beneath it
  $("import").disabled = true;
  const leave = toast(`Importing ${file.name} …`, "", null, IMPORT_MS);
  let report;
  try {
    const { conversations, messages, left_out } = await api("POST", "/api/v1/import", file, { type, timeout: IMPORT_MS });
    const left = left_out.map(({ reason, count }) => `${reason} (${count})`).join("; ");
    const came = `New conversations: ${conversations.imported}, new messages: ${messages.imported}`;
    report = [`Imported ${file.name}. ${came}.${left && ` Left out: ${left}.`}`, left ? 30_000 : 6000];
  } catch (error) {
    report = [`Not imported: ${file.name}: ${error.message}`, 30_000];
  }
  leave();
  toast(report[0], "", null, report[1]);
  $("import").disabled = false;
  await refreshList(); // after a refusal too: what came before it is in
}

function startSettings() {
  const theme = memory.get("theme") ?? "system";
  const radios = [...$("theme").querySelectorAll("input")];
  for (const radio of radios) {
    radio.checked = radio.value === theme;
    radio.onchange = () => setTheme(radio.value);
  }
  $("open-settings").onclick = () => (closeDrawer(), openSettings());
  $("close-settings").onclick = () => $("settings").close();
  $("settings").onclick = (event) => {
    if (event.target === $("settings")) $("settings").close(); // beside it
  };
  $("system").onchange = () => changeConversation({ system: $("system").value });
  $("temperature").oninput = () => showTemperature($("temperature").value);
  $("temperature").onchange = () => changeConversation({ temperature: Number($("temperature").value) });
  $("temperature-default").onclick = () => {
    showTemperature(null);
    $("temperature").focus();
    changeConversation({ temperature: null });
  };
  $("import").onclick = () => $("import-file").click();
  $("import-file").onchange = async () => {
    if ($("import-file").files[0]) await importFile($("import-file").files[0]);
    $("import-file").value = "";
  };
  const keys = KEYS.flatMap(([key, meaning]) => [make("dt", {}, make("kbd", {}, key)), make("dd", {}, meaning)]);
  $("keys").replaceChildren(...keys);
}

// ── 13. Connection and polling ───────────────────────────────────────────────────────────────────────────────────
//
// Nothing is asked for on a timer unless something runs somewhere or the server is lost.

let pollTimer = 0;

function setLost(isLost) {
  const isChanged = state.lost !== isLost;
  state.lost = isLost;
  renderBanner();
  if (isChanged && isLost) schedulePoll();
}

function renderBanner() {
  const text = !navigator.onLine
    ? "You are offline. Answers go on at the server and will be here when you are back."
    : state.lost
      ? "The server cannot be reached. Trying again…"
      : "";
  $("banner").hidden = !text;
  $("banner").textContent = text;
}

function schedulePoll() {
  clearTimeout(pollTimer);
  const runs = state.list.some((one) => one.running) || state.conversation?.running();
  if (!runs && !state.lost) return;
  pollTimer = setTimeout(refreshList, document.visibilityState === "visible" ? 3000 : 5000);
}

/** The page or the network came back. */
function wake() {
  renderBanner();
  updateTitle();
  if (document.visibilityState !== "visible") return syncStream();
  if (state.stream && (state.stream.failures > 0 || Date.now() - state.stream.seenAt > 16_000)) state.stream.reopen();
  syncStream();
  refreshList();
}

function startConnection() {
  document.addEventListener("visibilitychange", wake);
  addEventListener("pageshow", (event) => {
    if (event.persisted) state.stream?.reopen();
    wake();
  });
  addEventListener("online", () => {
    state.stream?.reopen(); // whatever was open went over the network that is gone
    wake();
  });
  addEventListener("offline", renderBanner);
  addEventListener("pagehide", () => {
    saveDraft();
    for (const id of state.deleting.keys()) finishDeleting(id, { keepalive: true });
  });
}

// ── 14. Keyboard ─────────────────────────────────────────────────────────────────────────────────────────────────

function onKey(event) {
  const isCommand = event.ctrlKey || event.metaKey;
  const key = event.key.toLowerCase();
  if (isCommand && !event.shiftKey && key === "k") {
    openDrawer();
    $("search").select();
  } else if (isCommand && event.shiftKey && key === "o") {
    go("/");
  } else if (key === "escape" && !event.isComposing) {
    if (document.querySelector("dialog[open], [popover]:popover-open")) return;
    if (document.body.classList.contains("drawer")) closeDrawer();
    else if (state.conversation.running()) stopAnswer();
    else return;
  } else if (event.key === "ArrowUp" && document.activeElement === box && !box.value && !isCommand && !event.shiftKey) {
    const last = state.conversation.path().findLast((message) => message.role === "user");
    if (!last || state.conversation.running()) return;
    turnOf(last).edit();
    turnOf(last).element.scrollIntoView({ block: "nearest" });
  } else {
    return;
  }
  event.preventDefault();
}

// ── 15. Addresses and start ──────────────────────────────────────────────────────────────────────────────────────

function idOfAddress() {
  const match = location.pathname.match(/^\/c\/(\d+)$/);
  return match ? Number(match[1]) : null;
}

function go(path, found = null) {
  if (path !== location.pathname) {
    saveDraft();
    history.pushState(null, "", path);
  }
  scroll.follows = true;
  return openConversation(idOfAddress(), found);
}

/** Links within the page change the page, not the document. */
function onLink(event) {
  const link = event.target.closest("a");
  if (!link || event.defaultPrevented || event.button || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
  const path = link.getAttribute("href");
  if (path !== "/" && !/^\/c\/\d+$/.test(path)) return;
  event.preventDefault();
  go(path, Number(link.dataset.found) || null);
}

function start() {
  setTheme(memory.get("theme") ?? "system");
  startSidebar();
  startSettings();
  startComposer();
  startScrolling();
  startConnection();
  startPicker();
  renderEmpty();
  document.addEventListener("click", onLink);
  document.addEventListener("keydown", onKey);
  addEventListener("popstate", () => {
    scroll.follows = true;
    openConversation(idOfAddress());
  });
  openConversation(idOfAddress());
  loadModels();
  refreshList();
  renderBanner();
}

start();
