// The reader of completions. Whatever a model or a data set wrote goes into the page as text and never as markup.
const ROW = 48, SPARE = 12, WHOLE = 20000;
const STATES = [["right", "✓"], ["wrong", "✕"], ["no verdict", "?"]];
const COLOURS = {
  none: { title: "no colour" },
  logp: { title: "log-probability", unit: "nats", from: 0, low: -3 },
  entropy: { title: "entropy", unit: "nats", from: 0, high: 0.5 },
  ratio: { title: "ratio", unit: "", from: 1, spread: 0.01, log: true },
  advantage: { title: "advantage", unit: "", from: 0, spread: 0.5 },
  gap: { title: "gap", unit: "nats", from: 0, spread: 0.001 },
};
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

const reader = {
  table: null, runs: [], shown: [], at: 0, state: -1, colour: "logp", view: "group", low: null,

  load(table, runs) {
    const kept = reader.table && reader.shown.length ? reader.key(reader.shown[reader.at]) : null;
    reader.table = table;
    reader.runs = runs;
    reader.low = null;
    const size = table ? table.text.length : 0;
    $("reader").hidden = !size;
    $("nothing").hidden = !!size;
    if (!size) return;
    const some = table.kept < table.total ? `${table.kept.toLocaleString("en")} of ${table.total.toLocaleString("en")} completions are in this page: whole batches, spread over the run` : `${table.total.toLocaleString("en")} completions`;
    $("shown").textContent = `${some}${runs.some((run) => run.arm) ? "; of each arm its first seed" : ""}. Tokens are recorded for ${table.traces.length.toLocaleString("en")}.`;
    reader.fill($("which"), [["", "all runs"], ...runs.map((run, n) => [n, run.name])]);
    $("which").hidden = runs.length < 2;
    const steps = [...new Set(table.step)].sort((a, b) => a - b);
    reader.fill($("steps"), [["", "all steps"], ...steps.map((step) => [step, `step ${step}`])]);
    reader.choose(kept);
  },

  fill(select, options) {
    const before = select.value;
    select.replaceChildren(...options.map(([value, text]) => { const option = make("option", "", text); option.value = value; return option; }));
    if (options.some(([value]) => String(value) === before)) select.value = before;
  },

  key(n) { const t = reader.table; return [t.run[n], t.step[n], t.prompts[t.prompt[n]].id, t.sample[n]].join("\n"); },

  // ── which ones ──────────────────────────────────────────────────────────────────────────────
  choose(kept) {
    const t = reader.table, run = $("which").value, step = $("steps").value, words = $("search").value.toLowerCase();
    if (words && !reader.low) reader.low = t.text.map((text, n) => { const p = t.prompts[t.prompt[n]]; return `${p.text}\n${text}\n${p.answer}\n${p.id}`.toLowerCase(); });
    const counts = [0, 0, 0, 0, 0], found = [];
    for (let n = 0; n < t.text.length; n++) {
      if (run !== "" && t.run[n] !== Number(run)) continue;
      if (step !== "" && t.step[n] !== Number(step)) continue;
      if (words && !reader.low[n].includes(words)) continue;
      counts[0]++; counts[t.state[n] + 1]++; counts[4] += t.cut[n];
      if (reader.state < 0 || (reader.state === 3 ? t.cut[n] : t.state[n] === reader.state)) found.push(n);
    }
    const order = $("order").value, name = order.replace("-", "");
    if (name === "trace") found.sort((a, b) => (t.trace[a] < 0) - (t.trace[b] < 0) || a - b);
    else if (name) { const sign = order.startsWith("-") ? -1 : 1; found.sort((a, b) => sign * ((t[name][a] ?? Infinity) - (t[name][b] ?? Infinity)) || a - b); }
    reader.shown = found;
    const again = kept ? found.findIndex((n) => reader.key(n) === kept) : -1;
    reader.at = again >= 0 ? again : 0;
    reader.states(counts);
    $("count").textContent = `${found.length.toLocaleString("en")} shown`;
    $("rows").style.height = `${found.length * ROW}px`;
    if (!kept) $("list").scrollTop = 0;
    reader.rows();
    reader.detail();
  },

  states(counts) {
    const names = [["all", -1, 0, "a"], ["right", 0, 1, "r"], ["wrong", 1, 2, "w"], ["cut off", 3, 4, "x"], ["no verdict", 2, 3, "u"]];
    $("states").replaceChildren(...names.map(([name, state, count, key]) => {
      const button = make("button", "", name);
      button.type = "button"; button.title = `key ${key}`; button.dataset.state = name;
      button.append(make("small", "", counts[count].toLocaleString("en")));
      button.setAttribute("aria-pressed", String(reader.state === state));
      button.addEventListener("click", () => reader.only(state));
      return button;
    }));
  },

  only(state) { reader.state = state; reader.choose(null); },

  // ── the list: only the rows that can be seen exist ──────────────────────────────────────────
  rows() {
    const list = $("list"), first = Math.max(0, Math.floor(list.scrollTop / ROW) - SPARE);
    const last = Math.min(reader.shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + SPARE);
    const fresh = [];
    for (let place = first; place < last; place++) fresh.push(reader.row(place));
    $("rows").replaceChildren(...fresh);
    list.setAttribute("aria-activedescendant", `row-${reader.at}`);
  },

  row(place) {
    const t = reader.table, n = reader.shown[place], row = make("div", place === reader.at ? "row chosen" : "row");
    row.id = `row-${place}`; row.style.top = `${place * ROW}px`;
    row.setAttribute("role", "option"); row.setAttribute("aria-selected", String(place === reader.at));
    const sign = make("span", `sign s${t.state[n]}`, STATES[t.state[n]][1]);
    sign.title = STATES[t.state[n]][0];
    const run = reader.runs.length > 1 ? reader.runs[t.run[n]] : null, side = make("span", "side", `step ${t.step[n]}`);
    if (run) side.prepend(make("span", "", `${reader.clip(run.arm || run.name, 18)} · `));
    if (t.cut[n]) side.prepend(make("span", "cut", "cut off  "));
    if (t.trace[n] >= 0) side.prepend(make("span", "", "▦ "));
    side.title = `step ${t.step[n]}${t.trace[n] >= 0 ? ", with tokens" : ""}`;
    row.append(sign, make("span", "line", reader.short(t.prompts[t.prompt[n]].text)), make("span", "line", reader.short(t.text[n])), side);
    row.addEventListener("click", () => reader.go(place));
    return row;
  },

  clip(text, most) { return text.length > most ? `${text.slice(0, most - 1).replace(/[\s,;]+$/, "")}…` : text; },

  short(text) { return text.slice(0, 160).replace(/\s*\n\s*/g, " ⏎ ").replace(UNSEEN, "·"); },

  go(place) {
    if (!reader.shown.length) return;
    reader.at = Math.max(0, Math.min(reader.shown.length - 1, place));
    const list = $("list"), top = reader.at * ROW;
    if (top < list.scrollTop) list.scrollTop = top;
    if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
    reader.rows();
    reader.detail();
  },

  // ── one completion, its group, or the same prompt in two runs ───────────────────────────────
  group(n) {
    const t = reader.table, found = [];
    for (let i = 0; i < t.text.length; i++) if (t.run[i] === t.run[n] && t.step[i] === t.step[n] && t.prompt[i] === t.prompt[n]) found.push(i);
    return found.sort((a, b) => t.sample[a] - t.sample[b]);
  },

  twins(n) {
    const t = reader.table, id = t.prompts[t.prompt[n]].id, best = new Map();
    for (let i = 0; i < t.text.length; i++) {
      if (t.run[i] === t.run[n] || t.prompts[t.prompt[i]].id !== id) continue;
      const far = Math.abs(t.step[i] - t.step[n]) * 1000 + Math.abs(t.sample[i] - t.sample[n]), old = best.get(t.run[i]);
      if (!old || far < old[0]) best.set(t.run[i], [far, i]);
    }
    return [n, ...[...best.entries()].sort((a, b) => a[0] - b[0]).map(([, [, i]]) => i)];
  },

  detail() {
    const place = $("detail"), n = reader.shown[reader.at], t = reader.table;
    $("tip").hidden = true;
    if (n === undefined) { place.replaceChildren(make("p", "faint", "None is like this.")); return; }
    const prompt = t.prompts[t.prompt[n]], asked = make("div", "text prompt");
    reader.write(asked, prompt.text, 4000);
    const gold = make("div", "text prompt");
    reader.write(gold, prompt.answer || "–", 2000);
    const among = reader.view === "group" ? reader.group(n) : reader.view === "two" ? reader.twins(n) : [n];
    const cards = make("div", `cards ${reader.view === "alone" ? "one" : reader.view === "two" && among.length < 3 ? "two" : ""}`);
    const range = reader.range(among);
    cards.append(...among.map((i) => reader.card(i, i === n, range)));
    if (reader.view === "two" && among.length < 2) cards.append(make("p", "faint", "No other run of this page was asked this. Runs of one task and seed are asked the same."));
    const above = make("div", "asking"), left = make("div"), right = make("div");
    left.append(make("h3", "", "Asked"), asked);
    right.append(make("h3", "", "Gold answer"), gold);
    above.append(left, right);
    place.replaceChildren(above, reader.tools(range), cards);
    place.scrollTop = 0;
  },

  tools(range) {
    const bar = make("div", "tools"), views = make("div", "chips"), select = make("select");
    const kinds = [["alone", "alone"], ["group", "its group"]];
    if (reader.runs.length > 1) kinds.push(["two", "other runs"]);
    views.append(...kinds.map(([name, title]) => {
      const button = make("button", "", title);
      button.type = "button"; button.dataset.view = name;
      button.setAttribute("aria-pressed", String(reader.view === name));
      button.addEventListener("click", () => { reader.view = name; reader.detail(); });
      return button;
    }));
    select.id = "colour"; select.setAttribute("aria-label", "Colour of tokens");
    select.append(...Object.entries(COLOURS).map(([name, { title }]) => { const option = make("option", "", title); option.value = name; return option; }));
    select.value = reader.colour;
    select.addEventListener("change", () => { reader.colour = select.value; reader.detail(); $("colour").focus(); });
    bar.append(views, select);
    if (range) bar.append(reader.scale(range));
    return bar;
  },

  card(n, chosen, range) {
    const t = reader.table, card = make("div", chosen && reader.view !== "alone" ? "card chosen" : "card"), head = make("header");
    if (reader.runs.length > 1) head.append(make("span", "where", reader.runs[t.run[n]].name));
    head.append(make("b", `s${t.state[n]}`, `${STATES[t.state[n]][1]} ${STATES[t.state[n]][0]}`));
    head.append(make("span", "", t.reward[n] === null ? "no reward" : `reward ${+t.reward[n].toFixed(4)}`));
    head.append(make("span", "", `${t.tokens[n].toLocaleString("en")} tokens`), make("span", "", `step ${t.step[n]}, sample ${t.sample[n]}`));
    if (t.cut[n]) head.append(make("span", "cut", "cut off at the length cap"));
    const text = make("div", "text"), foot = make("footer"), trace = t.traces[t.trace[n]];
    if (trace && !$("search").value) reader.tokens(text, trace, range); else reader.write(text, t.text[n], WHOLE, $("search").value);
    if (t.more[n]) text.append(make("p", "faint", `… and ${t.more[n].toLocaleString("en")} characters more, in rollouts.jsonl`));
    if (!t.text[n]) text.append(make("span", "faint", "(empty)"));
    reader.verdict(foot, n);
    if (reader.colour !== "none" && !trace && reader.view === "alone") foot.append(make("div", "faint", "Its tokens were not recorded; “with tokens first” finds those that were."));
    card.append(head, text);
    if (foot.childNodes.length) card.append(foot);
    if (reader.view !== "alone") card.addEventListener("click", () => { const place = reader.shown.indexOf(n); if (place >= 0) reader.go(place); });
    return card;
  },

  // What the grader took for its answer, and why the verdict is what it is.
  verdict(foot, n) {
    const t = reader.table, lines = make("dl", "why");
    const line = (name, fill) => { const told = make("dd"); fill(told); lines.append(make("dt", "", name), told); };
    if (t.said[n]) line("answer", (told) => { const read = make("code", `s${t.state[n]}`); reader.write(read, t.said[n], 400); told.append(read); });
    if (t.reason[n]) line("verdict", (told) => reader.write(told, `${STATES[t.state[n]][0]}: ${t.reason[n]}`, 2000));
    if (t.parts[n]) line("parts", (told) => reader.write(told, t.parts[n], 2000));
    if (lines.childNodes.length) foot.append(lines);
  },

  // Text as it is; what cannot be seen, or would turn the rest around, as its number.
  write(place, text, most, words) {
    const part = text.slice(0, most);
    let from = 0;
    const plain = (piece) => { if (piece) reader.marked(place, piece, words); };
    for (const found of part.matchAll(UNSEEN)) {
      plain(part.slice(from, found.index));
      place.append(make("span", "code", found[0].charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")));
      from = found.index + 1;
    }
    plain(part.slice(from));
    if (text.length > most) {
      const more = make("button", "", `${(text.length - most).toLocaleString("en")} characters more`);
      more.type = "button";
      more.addEventListener("click", (event) => { event.stopPropagation(); place.replaceChildren(); reader.write(place, text, most * 10, words); });
      place.append(document.createTextNode("\n"), more);
    }
  },

  marked(place, piece, words) {
    const low = piece.toLowerCase(), sought = (words || "").toLowerCase();
    let from = 0, at = sought ? low.indexOf(sought) : -1;
    while (at >= 0) {
      place.append(piece.slice(from, at), make("mark", "", piece.slice(at, at + sought.length)));
      from = at + sought.length;
      at = low.indexOf(sought, from);
    }
    place.append(piece.slice(from));
  },

  // ── colours of tokens ───────────────────────────────────────────────────────────────────────
  of(trace, name, i) { const values = trace[name]; return Array.isArray(values) ? values[i] : values; },

  range(among) {
    const kind = COLOURS[reader.colour], values = [];
    if (reader.colour === "none") return null;
    for (const n of among) {
      const trace = reader.table.traces[reader.table.trace[n]];
      if (trace) trace.tokens.forEach((_, i) => { const v = reader.of(trace, reader.colour, i); if (v !== null && v !== undefined) values.push(kind.log ? Math.log(Math.max(v, 1e-9)) : v); });
    }
    if (!values.length) return null;
    const size = values.map((v) => Math.abs(v)).sort((a, b) => a - b), far = size[Math.floor(0.98 * (size.length - 1))];
    return { kind, far: Math.max(far, kind.spread || kind.high || -kind.low || 0) };
  },

  shade(value, { kind, far }) {
    if (value === null || value === undefined) return "";
    const v = (kind.log ? Math.log(Math.max(value, 1e-9)) : value) / far, strength = Math.min(1, Math.abs(v)) * (theme.dark ? 0.62 : 0.5);
    const [r, g, b] = kind.low !== undefined || v < 0 ? [226, 118, 32] : [52, 120, 232];
    return `rgba(${r},${g},${b},${strength.toFixed(3)})`;
  },

  number(value, digits) {
    const size = Math.abs(value), told = size > 0 && (size < 1e-3 || size >= 1e6) ? Number(value).toExponential(digits - 1) : Number(Number(value).toPrecision(digits)).toString();
    return told.replaceAll("-", "−");
  },

  scale(range) {
    const { kind, far } = range, scale = make("span", "scale"), strip = make("i"), end = (v) => reader.number(kind.log ? Math.exp(v) : v, 3);
    const stops = kind.low !== undefined ? [0, -far] : kind.high !== undefined ? [0, far] : [-far, 0, far];
    strip.style.backgroundImage = `linear-gradient(90deg, ${stops.map((v) => reader.shade(kind.log ? Math.exp(v) : v, range)).join(", ")})`;
    scale.append(end(stops[0]), strip, `${end(stops.at(-1))} ${kind.unit}`);
    return scale;
  },

  tokens(place, trace, range) {
    const many = document.createDocumentFragment();
    trace.tokens.slice(0, 6000).forEach((text, i) => {
      const token = make("span", "token");
      reader.write(token, text, 2000);
      if (range) token.style.backgroundColor = reader.shade(reader.of(trace, reader.colour, i), range);
      if (i === trace.tokens.length - 1 && /^<.*>$/.test(text)) token.classList.add("end");
      token.dataset.i = i;
      many.append(token);
    });
    place.append(many);
    if (trace.tokens.length > 6000) place.append(make("p", "faint", `… and ${trace.tokens.length - 6000} tokens more, in tokens.jsonl`));
    place.addEventListener("mouseover", (event) => { const token = event.target.closest(".token"); if (token) reader.tip(token, trace); });
    place.addEventListener("mouseleave", () => { $("tip").hidden = true; });
  },

  tip(token, trace) {
    const tip = $("tip"), table = make("table"), i = Number(token.dataset.i), box = token.getBoundingClientRect();
    const names = { logp: "log-probability, trainer", logp_rollout: "log-probability, engine", gap: "gap of the engine", entropy: "entropy", ratio: "ratio", advantage: "advantage" };
    for (const [name, title] of Object.entries(names)) {
      const value = reader.of(trace, name, i), row = make("tr");
      if (value === null || value === undefined) continue;
      row.append(make("td", "", title), make("td", "", `${reader.number(value, 4)}${name === "ratio" || name === "advantage" ? "" : " nats"}`));
      table.append(row);
    }
    tip.replaceChildren(table);
    tip.hidden = false;
    tip.style.left = `${Math.min(box.left, innerWidth - tip.offsetWidth - 12)}px`;
    tip.style.top = `${box.bottom + tip.offsetHeight + 12 > innerHeight ? box.top - tip.offsetHeight - 6 : box.bottom + 6}px`;
  },

  beside(by) {
    const among = reader.group(reader.shown[reader.at]), at = among.indexOf(reader.shown[reader.at]);
    for (let i = at + by; i >= 0 && i < among.length; i += by) { const place = reader.shown.indexOf(among[i]); if (place >= 0) return reader.go(place); }
  },

  begin() {
    let soon = 0;
    $("list").addEventListener("scroll", () => { if (!soon) soon = requestAnimationFrame(() => { soon = 0; reader.rows(); }); }, { passive: true });
    for (const id of ["which", "steps", "order"]) {
      let pointed = false; // with the mouse: the keys then belong to the list again
      $(id).addEventListener("pointerdown", () => { pointed = true; });
      $(id).addEventListener("keydown", () => { pointed = false; });
      $(id).addEventListener("change", () => { reader.choose(null); if (pointed) $("list").focus({ preventScroll: true }); });
    }
    let wait = 0;
    $("search").addEventListener("input", () => { clearTimeout(wait); wait = setTimeout(() => reader.choose(null), 80); });
    new ResizeObserver(() => { if (reader.table) reader.rows(); }).observe($("list"));
    theme.changed.push(() => { if (reader.shown.length) reader.detail(); });
  },
};
