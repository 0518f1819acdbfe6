"use strict";
const MOST_USERS = 4, SHOWN_USERS = 60;
const at = (id) => document.getElementById(id);
const number = (id) => at(id).valueAsNumber;
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const count = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

/** An element. What comes from the service becomes text nodes: it is never read as HTML. */
function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

/** A button that can not be used keeps the focus. */
function allow(button, yes) { button.ariaDisabled = String(!yes); }
const allowed = (button) => button.ariaDisabled !== "true";

// -- the service ------------------------------------------------------------------------------------------------------

let key = "";

/** The response to a call. Throws an Error that says in words what went wrong. */
async function call(path, { body, signal } = {}) {
  const headers = { ...(key && { Authorization: `Bearer ${key}` }), ...(body && { "Content-Type": "application/json" }) };
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    throw signal?.aborted ? error : new Error("The service does not answer. Is it still running?");
  }
  if (response.ok) return response;
  if (response.status === 401) at("key-box").open = true;
  const said = await response.json().catch(() => null);
  const wait = response.headers.get("Retry-After");
  const message = said?.error?.message ?? `the service failed with status ${response.status}`;
  throw new Error(wait ? `${message}. Try again in ${wait} s.` : message);
}

/** Calls take(chunk) with each chunk of a streamed answer. */
async function stream(body, signal, take) {
  const response = await call("/v1/chat/completions", { body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read().catch((error) => {
      if (signal.aborted) throw error;
      return { done: true };
    });
    if (done) throw new Error("The answer broke off: the service may have ended.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events.filter((one) => one.startsWith("data: "))) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      take(chunk);
    }
  }
}

// -- users ------------------------------------------------------------------------------------------------------------

let model, users = [];
let ours = { fields: [], needs_user: false };  // what a call may say beside OpenAI's fields
const picked = new Set([""]);  // "" is "unguided"
const weight = () => ["strength", "reward_weight"].find((field) => ours.fields.includes(field));

async function load() {
  at("error").textContent = "";
  try {
    ({ id: model, pyargs: ours } = (await (await call("/v1/models")).json()).data[0]);
    at("model").textContent = `Served here: ${model}`;
    at("weight").hidden = at("legend-moved").hidden = !weight();
    at("weight-name").textContent = weight() === "reward_weight" ? "Weight of the reward" : "Strength of the reward";
    at("nobody-note").hidden = ours.needs_user;
    if (ours.needs_user) picked.delete("");
    await loadUsers();
  } catch (error) {
    at("error").textContent = error.message;
  }
}

async function loadUsers() {
  const { data, keeps } = await (await call("/v1/users?limit=1000")).json();
  at("new-user").hidden = !keeps;
  users = data.filter((user) => user.source === "model" || user.adapted !== null).map((user) => user.id);
  for (const id of pickedUsers()) if (!users.includes(id)) users.push(id);
  if (!pickedUsers().length) users.slice(0, 2).forEach((id) => picked.add(id));
  showUsers();
}

function showUsers() {
  const wanted = at("find").value.trim().toLowerCase();
  const found = users.filter((id) => !picked.has(id) && id.toLowerCase().includes(wanted)).slice(0, SHOWN_USERS);
  const nobody = ours.needs_user ? [] : [""];
  const boxes = [...nobody, ...users.filter((id) => picked.has(id) || found.includes(id))];
  at("users").replaceChildren(...boxes.map(userBox));
  limitUsers();
}

function userBox(id) {
  const box = make("input", { type: "checkbox", value: id, checked: picked.has(id) });
  box.addEventListener("change", () => {
    box.checked ? picked.add(id) : picked.delete(id);
    limitUsers();
  });
  return make("label", {}, box, " ", id || make("em", {}, "unguided"));
}

const pickedUsers = () => [...picked].filter((id) => id);

function limitUsers() {
  const full = pickedUsers().length >= MOST_USERS;
  for (const box of at("users").querySelectorAll("input")) box.disabled = full && box.value && !box.checked;
}

at("find").addEventListener("input", showUsers);
at("find").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  const typed = at("find").value, found = users.filter((id) => id.toLowerCase().includes(typed.trim().toLowerCase()));
  const id = found.length === 1 ? found[0] : typed;
  if (!id || pickedUsers().length >= MOST_USERS) return;
  if (!users.includes(id)) users.push(id);  // a list of users ends somewhere, and not every service has one
  picked.add(id);
  at("find").value = "";
  showUsers();
});

// -- answers ----------------------------------------------------------------------------------------------------------

const spans = new WeakMap();  // of a token's element: its answer and its log-probs
let running = new AbortController();

/** An answer's card, to be written by `write`. weight: w of log-prob + w reward, once it is known. */
function card(title, greedy) {
  const text = make("p", { className: "text" }), foot = make("p", { className: "note" });
  const node = make("article", { ariaBusy: "true", ariaLabel: title }, make("h3", {}, title), text, foot);
  return { node, text, foot, greedy, weight: null, moved: 0, seen: false };
}

/** Streams an answer into its card. Returns its text, or null where it did not come to its end. */
async function write(card, body, signal) {
  const began = performance.now();
  let tokens = null, end = "";
  try {
    await stream({ model, stream: true, stream_options: { include_usage: true }, ...body }, signal, (chunk) => {
      tokens = chunk.usage?.completion_tokens ?? tokens;
      for (const choice of chunk.choices) {
        add(card, choice);
        end = choice.finish_reason ?? end;
        card.weight = choice.pyargs?.reward_weight ?? card.weight;
      }
    });
  } catch (error) {
    card.foot.className = signal.aborted ? "note" : "error";
    if (!signal.aborted) card.foot.role = "alert";
    card.foot.textContent = signal.aborted ? "Stopped." : error.message;
    return null;
  } finally {
    card.node.ariaBusy = "false";
    if (spans.get(shown)?.card === card) show(shown);  // its weight is known now
  }
  const seconds = ((performance.now() - began) / 1000).toFixed(1);
  const parts = [`${tokens === null ? "" : `${count(tokens, "token")} in `}${seconds} s`];
  if (end === "length") parts.push("cut at the limit");
  if (card.seen && card.greedy && weight() in body) parts.push(`${card.moved} changed by the reward`);
  card.foot.textContent = parts.join(" · ");
  return card.text.textContent;
}

/** Adds a chunk's text. Each token is an element of its own where the chunk tells which text is whose. */
function add(card, choice) {
  const text = choice.delta?.content ?? "", told = choice.logprobs?.content ?? [];
  const apart = told.map((one) => one.token).join("") === text;
  for (const [part, tokens] of apart ? told.map((one) => [one.token, [one]]) : [[text, told]]) {
    if (!part) continue;
    if (!tokens.length) { card.text.append(part); continue; }
    const moved = card.greedy && weight() && tokens.some((one) => one.token !== likeliest(one)?.token);
    const span = make("span", { className: moved ? "token moved" : "token", tabIndex: card.seen ? -1 : 0 }, part);
    spans.set(span, { card, tokens });
    card.text.append(span);
    card.seen = true;
    card.moved += Boolean(moved);
  }
}

/** The candidate that the model alone likes best. */
function likeliest(token) {
  return token.top_logprobs.reduce((best, one) => (best && best.logprob >= one.logprob ? best : one), null);
}

at("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  running.abort();
  const mine = running = new AbortController();
  at("error").textContent = picked.size ? "" : "Pick somebody first.";
  if (!picked.size) return;
  const seed = number("seed"), candidates = number("num-candidates"), greedy = number("temperature") === 0;
  const body = {
    messages: [{ role: "user", content: at("prompt").value }],
    max_tokens: number("max-tokens"), temperature: number("temperature"),
    ...(ours.fields.includes("num_candidates") ? { num_candidates: candidates } : {}),
    logprobs: true, top_logprobs: candidates, ...(Number.isNaN(seed) ? {} : { seed }),
  };
  const who = ["", ...users].filter((id) => picked.has(id)), rewarded = weight() ? { [weight()]: number("strength") } : {};
  const title = (id) => (weight() ? `${id}, ${weight().replace("reward_", "")} ${number("strength").toFixed(1)}` : id);
  const cards = who.map((id) => card(id ? title(id) : "unguided", greedy));
  hide();
  at("answers").replaceChildren(...cards.map((one) => one.node));
  at("legend").hidden = true;
  at("status").textContent = `${count(who.length, "answer")} on the way.`;
  allow(at("stop"), true);
  await Promise.all(who.map((id, i) =>
    write(cards[i], { ...body, ...(id && { user: id, ...rewarded }) }, mine.signal)));
  if (running !== mine) return;  // asked again since
  allow(at("stop"), false);
  at("legend").hidden = !cards.some((one) => one.seen);
  at("status").textContent = mine.signal.aborted ? "Stopped." : "All answers have ended.";
});

at("stop").addEventListener("click", () => running.abort());

// -- candidates of a token --------------------------------------------------------------------------------------------

let shown = null, leaving;

function show(span) {
  hide();
  shown = span;
  span.classList.add("shown");
  span.setAttribute("aria-describedby", "candidates");
  const { card, tokens } = spans.get(span), panel = at("candidates");
  panel.replaceChildren(...tokens.map((token) => table(card, token)));
  panel.hidden = false;
  place();
}

/** Below the token where there is room, else above it; nowhere where the token has been scrolled away. */
function place() {
  if (!shown) return;
  const panel = at("candidates"), { top, bottom, left } = shown.getClientRects()[0];
  const { width, height } = panel.getBoundingClientRect();
  if (bottom < 0 || top > innerHeight) return hide();
  panel.style.top = `${bottom + height + 4 < innerHeight || top < height ? bottom + 4 : top - height - 4}px`;
  panel.style.left = `${Math.max(0, Math.min(left, document.documentElement.clientWidth - width - 4))}px`;
}

function hide() {
  clearTimeout(leaving);
  at("candidates").hidden = true;
  shown?.classList.remove("shown");
  shown?.removeAttribute("aria-describedby");
  shown = null;
}

/** Log-prob, reward and score of each candidate; which was chosen, and which is best for the model alone. */
function table(card, token) {
  const alone = likeliest(token), guided = token.top_logprobs.some((one) => one.reward !== null && one.reward !== undefined);
  const rows = token.top_logprobs.map((one) => {
    const chosen = one.token === token.token && one.logprob === token.logprob, marks = [];
    if (chosen) marks.push("chosen");
    if (one === alone && guided) marks.push(card.greedy ? "wins without reward" : "likeliest without reward");
    const score = card.weight === null ? "…" : (one.logprob + card.weight * one.reward).toFixed(2);
    const numbers = [one.logprob.toFixed(2), ...(guided ? [one.reward?.toPrecision(3) ?? "", score] : []), marks.join(", ")];
    return make("tr", { className: chosen ? "chosen" : "" },
      make("th", { scope: "row" }, make("code", {}, visible(one))), ...numbers.map((cell) => make("td", {}, cell)));
  });
  const names = ["token", "log-prob", ...(guided ? ["reward", "score"] : []), ""];
  const head = names.map((name) => make("th", { scope: "col" }, name));
  const caption = make("caption", {}, "Candidates of ", make("code", {}, visible(token)));
  return make("table", {}, caption, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
}

/** A token's text with its blanks seen; the bytes of a part of a character. */
function visible({ token, bytes }) {
  if (token.includes("\ufffd") && bytes) return bytes.map((byte) => `<${byte.toString(16).padStart(2, "0")}>`).join("");
  return token.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");
}

document.addEventListener("pointerover", (event) => {
  clearTimeout(leaving);
  const span = event.target.closest?.(".token");
  if (spans.has(span)) return span === shown || show(span);
  if (shown && !event.target.closest?.("#candidates")) leaving = setTimeout(hide, 200);
});
document.addEventListener("focusin", (event) => { if (spans.has(event.target)) show(event.target); });
document.addEventListener("focusout", (event) => { if (event.target === shown) hide(); });
document.addEventListener("scroll", place);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hide();
  if (!spans.has(event.target)) return;
  const all = [...event.target.parentNode.querySelectorAll(".token")], here = all.indexOf(event.target);
  const next = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: all.length - 1 }[event.key];
  if (next === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  if (!all[next]) return;
  event.target.tabIndex = -1;  // one stop of the tab key for each answer
  all[next].tabIndex = 0;
  all[next].focus();
});

// -- a new user -------------------------------------------------------------------------------------------------------

let pairs = [], settle = () => {};

at("new").addEventListener("submit", async (event) => {
  event.preventDefault();
  pairs = [];
  at("new-error").textContent = "";
  at("new").hidden = true;
  at("choosing").hidden = false;
  const prompts = at("new-prompts").value.split("\n").map((line) => line.trim()).filter((line) => line);
  for (const [i, prompt] of prompts.entries()) {
    showAdapt(`${i + 1} of ${prompts.length}: ${prompt}`);
    const chosen = await choice(prompt);
    if (chosen === "enough") return;
    if (chosen) pairs.push({ prompt, ...chosen });
  }
  showAdapt("These were all prompts. Who has chosen?");
});

function showAdapt(question) {
  at("question").textContent = question;
  at("question").focus();
  at("pair").replaceChildren();
  at("adapt-now").textContent = `Adapt to ${count(pairs.length, "choice")}`;
  allow(at("adapt-now"), pairs.length > 0);
}

/** {chosen, rejected} of two sampled answers; null when skipped, "enough" when the form is left. */
async function choice(prompt) {
  const answered = new Promise((resolve) => { settle = resolve; });
  const mine = new AbortController(), seed = Math.floor(Math.random() * 2 ** 31);
  const body = { messages: [{ role: "user", content: prompt }], temperature: 1, max_tokens: number("max-tokens") };
  const cards = ["first", "second"].map((name) => card(`The ${name} answer`, false));
  const buttons = ["first", "second"].map((name) => make("button", { type: "button" }, `The ${name} is better`));
  buttons.forEach((button, i) => { allow(button, false); cards[i].node.append(button); });
  at("pair").replaceChildren(...cards.map((one) => one.node));
  at("new-status").textContent = "Two answers on the way.";
  Promise.all(cards.map((one, i) => write(one, { ...body, seed: seed + i }, mine.signal))).then((texts) => {
    if (mine.signal.aborted) return;
    const usable = texts.every((text) => text?.trim()) && texts[0] !== texts[1];
    at("new-status").textContent = usable ? "Choose the better one." : "These two give no choice: skip this prompt.";
    buttons.forEach((button, i) => {
      allow(button, usable);
      button.addEventListener("click", () => usable && settle({ chosen: texts[i], rejected: texts[1 - i] }));
    });
  });
  const found = await answered;
  mine.abort();
  at("new-status").textContent = "";
  return found;
}

function leave() {
  settle("enough");
  at("choosing").hidden = true;
  at("new").hidden = false;
}

at("skip").addEventListener("click", () => settle(null));
at("leave").addEventListener("click", leave);
at("adapt").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!allowed(at("adapt-now"))) return;
  settle("enough");
  at("new-error").textContent = "";
  showAdapt("Adapting");
  allow(at("adapt-now"), false);
  try {
    await adapt(at("new-id").value);
    leave();
  } catch (error) {
    at("new-status").textContent = "";
    at("new-error").textContent = error.message;
    showAdapt("The choices are kept: adapt once more, or to another id.");
  }
});

async function adapt(id) {
  let job = await (await call(`/v1/users/${encodeURIComponent(id)}/pairs`, { body: { pairs } })).json();
  while (job.status === "queued" || job.status === "running") {
    at("new-status").textContent = job.status === "queued" ? "It waits for its turn." : "It may take some minutes.";
    await pause(500);
    job = await (await call(`/v1/jobs/${encodeURIComponent(job.id)}`)).json();
  }
  if (job.status !== "done") throw new Error(job.error ?? "the adaptation failed");
  if (pickedUsers().length >= MOST_USERS) picked.delete(pickedUsers().pop());
  picked.add(id);
  await loadUsers();
  at("new-status").textContent = `${id} is among the users now, and picked for the next prompt.`;
  at("new-id").value = "";
}

// -- the rest ---------------------------------------------------------------------------------------------------------

at("strength").addEventListener("input", () => { at("strength-shown").textContent = number("strength").toFixed(1); });
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit();
});
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = at("key").value;
  load().then(() => { at("key-box").open = at("error").textContent !== ""; });
});
showUsers();
load();
