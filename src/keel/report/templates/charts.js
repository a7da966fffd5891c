// Figures: drawn when they come into view, by a program that is unpacked when the first one does.
const charts = {
  hidden: new Set(),
  figures: [],
  program: null,
  watcher: null,
  async load() {
    charts.program ??= packed("plotly").then((text) => {
      const script = make("script");
      script.nonce = document.currentScript ? document.currentScript.nonce : NONCE;
      script.textContent = text;
      document.head.append(script);
    });
    return charts.program;
  },
  show(series, figures) {
    charts.figures = figures;
    charts.legend(series);
    const place = $("figures");
    const old = new Map([...place.querySelectorAll(".figure")].map((card) => [card.dataset.title, card]));
    charts.watcher ??= new IntersectionObserver((seen) => {
      for (const each of seen) if (each.isIntersecting && !each.target.drawn) { each.target.drawn = true; charts.draw(each.target); }
    }, { rootMargin: "300px" });
    const flat = figures.filter((figure) => figure.flat);
    $("flat").replaceChildren(...flat.map((figure) => make("span", "", `${figure.title} (${figure.note}): ${figure.flat}. `)));
    place.replaceChildren(...figures.filter((figure) => !figure.flat).map((figure) => {
      const card = old.get(figure.title) || charts.card(figure);
      card.figure = figure;
      if (card.drawn) charts.draw(card); else charts.watcher.observe(card);
      return card;
    }));
    if (!figures.length) place.append(make("p", "faint", "Nothing has been measured yet."));
  },
  card(figure) {
    const card = make("div", "figure");
    card.dataset.title = figure.title;
    card.append(make("h3", "", figure.title), make("p", "", figure.note), make("div", "plot"));
    return card;
  },
  legend(series) {
    const place = $("legend");
    place.hidden = series.length < 2;
    place.replaceChildren(...series.map(({ name, colour }) => {
      const button = make("button");
      const dot = make("i");
      dot.style.backgroundColor = colour;
      button.type = "button";
      button.append(dot, make("span", "", name));
      button.setAttribute("aria-pressed", String(!charts.hidden.has(name)));
      button.addEventListener("click", () => {
        if (!charts.hidden.delete(name)) charts.hidden.add(name);
        button.setAttribute("aria-pressed", String(!charts.hidden.has(name)));
        charts.again();
      });
      return button;
    }));
  },
  async draw(card) {
    const { figure } = card;
    const plot = card.querySelector(".plot");
    await charts.load();
    const data = figure.data.filter((trace) => !charts.hidden.has(trace.legendgroup));
    await Plotly.react(plot, data, charts.layout(figure.layout), { displayModeBar: false, responsive: true, showTips: false });
    card.dataset.drawn = "yes";
  },
  layout(own) {
    const grid = theme.colour("--line"), faint = theme.colour("--faint"), ink = theme.colour("--ink");
    const axis = { gridcolor: grid, linecolor: grid, zerolinecolor: grid, tickfont: { color: faint, size: 11 }, automargin: true, fixedrange: true };
    const x = { ...axis, showgrid: false, nticks: 6, ...own.xaxis };
    x.title = { text: own.xaxis.title.text, font: { size: 11, color: faint }, standoff: 6 };
    return {
      xaxis: x, yaxis: { ...axis, nticks: 5, ...own.yaxis }, margin: { l: 8, r: 8, t: 8, b: 8 }, showlegend: false, hovermode: "closest",
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: 12, family: getComputedStyle(document.body).fontFamily },
      hoverlabel: { bgcolor: theme.colour("--card"), bordercolor: grid, font: { color: ink } }, dragmode: false,
    };
  },
  again() {
    for (const card of document.querySelectorAll(".figure")) if (card.drawn) charts.draw(card);
  },
};
theme.changed.push(() => charts.again());
