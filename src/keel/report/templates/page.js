// Opening: unpack the data, show words, figures and completions; live, ask the server again every few seconds.
const NONCE = document.currentScript.nonce, LIVE = document.body.dataset.live;

async function packed(name) {
  if (LIVE) { const answer = await fetch(`${LIVE}${name}`); if (!answer.ok) throw new Error(`${name}: ${answer.status}`); return answer.text(); }
  const text = $(`blob-${name}`).textContent;
  const bytes = Uint8Array.fromBase64 ? Uint8Array.fromBase64(text) : Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

let stage;
function show(told) {
  if (LIVE && stage !== undefined && stage !== told.head.stage) { location.reload(); return; }
  stage = told.head.stage;
  $("headline").textContent = told.head.headline;
  $("notes").replaceChildren(...told.head.notes.map((note) => make("li", "", note)));
  skills(told.skills);
  charts.show(told.series, told.figures);
  if (told.runs) reader.load(told.rollouts, told.runs);
}

// Skills in rows; of one run before, after and change in columns, of several all in one.
function skills(table) {
  $("skills-section").hidden = !table;
  if (!table) return;
  const one = table.columns.length === 1, head = make("thead"), top = make("tr"), body = make("tbody");
  const titles = one ? ["before", "after", "change", ""] : table.columns;
  top.append(make("th", "", "skill"), ...titles.map((title) => make("th", "", title)));
  head.append(top);
  body.append(...table.rows.map((row) => {
    const line = make("tr", row.trained ? "trained" : ""), name = make("th", "", row.name);
    name.scope = "row";
    if (row.trained) name.append(make("span", "faint", " trained"));
    line.append(name);
    for (const cell of row.cells) {
      const change = make("td", `number ${cell.tone}`, cell.change || "–");
      if (one) line.append(make("td", "number", cell.before), make("td", "number", cell.after), change, make("td", cell.tone, cell.verdict));
      else { change.replaceChildren(make("span", "faint", `${cell.before} → `), make("b", "", cell.after), make("div", "", cell.change || "–")); line.append(change); }
    }
    return line;
  }));
  $("skills-table").replaceChildren(head, body);
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("input, select");
  if (event.key === "Escape" && typing) { event.target.blur(); $("list").focus({ preventScroll: true }); return; }
  if (typing || $("keys").open) return;
  const only = { a: -1, r: 0, w: 1, u: 2, x: 3 }, has = reader.table && !$("reader").hidden;
  const to = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1, J: 10, K: -10, PageDown: 10, PageUp: -10 }[event.key];
  const inList = document.activeElement === $("list");
  const colours = Object.keys(COLOURS), arrow = event.key.startsWith("Arrow") || event.key.startsWith("Page");
  if (event.key === "t") theme.next();
  else if (event.key === "?") $("keys").showModal();
  else if (!has) return;
  else if (to && (!arrow || inList)) { reader.near(); reader.go(reader.at + to); }
  else if (inList && event.key === "Home") reader.go(0);
  else if (inList && event.key === "End") reader.go(reader.shown.length - 1);
  else if (event.key === "h" || (inList && event.key === "ArrowLeft")) reader.beside(-1);
  else if (event.key === "l" || (inList && event.key === "ArrowRight")) reader.beside(1);
  else if (event.key in only) reader.only(only[event.key]);
  else if (event.key === "/") { reader.near(); $("search").focus({ preventScroll: true }); $("search").select(); }
  else if (event.key === "c") { reader.colour = colours[(colours.indexOf(reader.colour) + 1) % colours.length]; reader.detail(); }
  else if (event.key === "g") { reader.view = reader.view === "group" ? "alone" : "group"; reader.detail(); }
  else if (event.key === "v" && reader.runs.length > 1) { reader.view = reader.view === "two" ? "alone" : "two"; reader.detail(); }
  else return;
  event.preventDefault();
}

// A key that moves through completions brings them into view.
reader.near = () => {
  const box = $("reader").getBoundingClientRect();
  if (box.top > innerHeight * 0.6 || box.bottom < innerHeight * 0.3) $("reader-section").scrollIntoView();
  if (document.activeElement === document.body) $("list").focus({ preventScroll: true });
};

async function follow(mark) {
  const lamp = $("live");
  lamp.hidden = false;
  for (;;) {
    await new Promise((done) => setTimeout(done, 4000));
    if (document.hidden) continue;
    try {
      const answer = await fetch(`${LIVE}data`, { headers: mark ? { "If-None-Match": mark } : {} });
      lamp.className = "live";
      lamp.textContent = "live";
      if (answer.status === 304) continue;
      if (!answer.ok) throw new Error(answer.status);
      mark = answer.headers.get("ETag");
      show(await answer.json());
    } catch { lamp.className = "live lost"; lamp.textContent = "the server does not answer"; }
  }
}

async function open_page() {
  reader.begin();
  $("help").addEventListener("click", () => $("keys").showModal());
  document.addEventListener("keydown", keys);
  show(JSON.parse(await packed("data")));
  if (!LIVE) {
    const said = JSON.parse(await packed("said"));
    reader.load(said.rollouts, said.runs);
  }
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
  if (LIVE) { $("live").textContent = "live"; follow(null); }
}
open_page().catch((fault) => { $("figures").replaceChildren(make("p", "faint", `The data could not be read: ${fault.message}`)); throw fault; });
