"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const css = getComputedStyle(document.documentElement);
  const colour = (name) => css.getPropertyValue(`--${name}`).trim();
  const touch = matchMedia("(pointer: coarse)").matches;
  const CONFIG = { responsive: true, displayModeBar: false };
  const HOVERED_LAYERS = touch ? 4 : 8;

  /** Text that Plotly shows as it is: it takes a part of HTML for markup. */
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const clipped = (text, length = 28) => (text.length > length ? `…${text.slice(1 - length)}` : text);
  // Made once: a formatter takes longer to make than to use a hundred times.
  const formatters = [0, 3].map((digits) => new Intl.NumberFormat("en", { maximumFractionDigits: digits }));
  const number = (axis, value) =>
    axis.name === "divergence" ? value.toPrecision(4) : formatters[axis.name === "latency_ms" ? 1 : 0].format(value);

  /** A layout with the page's typeface and sizes, and what a plot changes in it. */
  function layout(own) {
    const axis = { automargin: true, zeroline: false, linecolor: "#999", showline: true, gridcolor: "#eee", ticks: "" };
    const title = own.title ? { ...own.title, font: { size: 14 }, x: 0, xref: "container", xanchor: "left" } : undefined;
    return {
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: "#1a1a1a" },
      paper_bgcolor: "#fff", plot_bgcolor: "#fff",
      margin: { l: 56, r: 14, t: own.title ? 46 : 18, b: 44 },
      hovermode: "closest", hoverlabel: { align: "left", bgcolor: "#fff", bordercolor: "#888", font: { color: "#1a1a1a" } },
      legend: { orientation: "h", x: 0, y: 0, yref: "container", yanchor: "bottom" },
      dragmode: touch ? false : "zoom",
      ...own, title,
      xaxis: { ...axis, ...own.xaxis }, yaxis: { ...axis, ...own.yaxis },
    };
  }

  function element(tag, text, attributes = {}) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  }

  function table(titles, rows) {
    const made = element("table"), head = element("tr"), body = element("tbody");
    for (const title of titles) head.append(element("th", title, { scope: "col" }));
    for (const cells of rows) {
      const row = element("tr");
      row.append(...cells);
      body.append(row);
    }
    const top = element("thead");
    top.append(head);
    made.append(top, body);
    const scroll = element("div", undefined, { class: "scroll", tabindex: "0", role: "region", "aria-label": "table" });
    scroll.append(made);
    return scroll;
  }

  // ---- the front ----
  const plot = document.getElementById("front-plot");
  const panel = document.getElementById("candidate");
  const selects = ["x", "y"].map((side) => document.getElementById(`axis-${side}`));
  const [axisX, axisY] = selects;
  const chosen = data.front.find((candidate) => candidate.chosen);
  let selected = chosen || data.front[0];

  const structure = (candidate, layer) => data.options[layer][candidate.structures[layer]];
  const costs = (trial) => data.axes.map((axis, i) => `${axis.name}: ${number(axis, trial.values[i])}`);

  /** "dense", or the family and the ranks. */
  function short(candidate, layer) {
    const family = data.families[layer][candidate.structures[layer]];
    const ranks = structure(candidate, layer).split(";")[1];
    return `${family}${ranks ? `, ${ranks.trim()}` : ""}`;
  }

  function hover(trial) {
    const lines = [trial.structures ? `trial ${trial.trial}${trial.chosen ? ", chosen" : ""}` : "a trial off the front"];
    lines.push(...costs(trial), trial.feasible ? "within the budget" : "not within the budget");
    if (trial.pruned) lines.push("stopped early, its divergence is extrapolated");
    if (trial.structures) {
      lines.push("");
      data.layers.slice(0, HOVERED_LAYERS).forEach((name, i) => lines.push(`${clipped(name)}: ${short(trial, i)}`));
      if (data.layers.length > HOVERED_LAYERS) lines.push(`and ${data.layers.length - HOVERED_LAYERS} more`);
    }
    return lines.map(plain).join("<br>");
  }

  /** The command that makes a network of a trial that has none; RUN and SOURCE are explained where the page ends. */
  function howToFinish(trial) {
    if (trial.chosen || data.finish === null) return [];
    const text = element("p", "Fit, train and report it: ");
    text.append(element("code", `${data.finish} ${trial.trial}`));
    return [text];
  }

  /** Costs and layers of a trial below the plot. */
  function show(trial) {
    const list = element("p", [...costs(trial), trial.feasible ? "within the budget" : "not within the budget"].join("; "));
    if (!trial.structures) {
      const text = "Layers are listed for candidates of the front only; search.json holds those of every trial.";
      panel.replaceChildren(element("h3", "A trial that is not on the front"), list, element("p", text));
      return;
    }
    const titles = ["layer", "structure"].concat(chosen && trial !== chosen ? ["of the chosen candidate"] : []);
    const rows = data.layers.map((name, i) => {
      const own = element("td"), cells = [element("th", name, { scope: "row" }), own];
      own.append(element("code", structure(trial, i)));
      if (titles.length > 2) {
        const same = structure(trial, i) === structure(chosen, i), other = element("td");
        other.append(same ? element("span", "the same", { class: "same" }) : element("code", structure(chosen, i)));
        cells.push(other);
      }
      return cells;
    });
    const heading = `Trial ${trial.trial}${trial.chosen ? ", the chosen candidate" : ""}`;
    panel.replaceChildren(element("h3", heading), list, ...howToFinish(trial), table(titles, rows));
  }

  const points = (trials, style) => ({
    type: "scatter", mode: "markers", customdata: trials, hoverinfo: "text", hovertext: trials.map(hover),
    x: trials.map((trial) => trial.values[axisX.value]), y: trials.map((trial) => trial.values[axisY.value]), ...style,
  });

  /** The trials that none beats on both axes shown, from left to right. */
  function pairFront() {
    const whole = [...data.front, ...data.others.filter((trial) => !trial.pruned)];
    const found = [];
    let least = Infinity;
    const ends = whole.map((trial) => [trial.values[axisX.value], trial.values[axisY.value]]);
    for (const [x, y] of ends.sort((a, b) => a[0] - b[0] || a[1] - b[1])) {
      if (y < least) {
        found.push([x, y]);
        least = y;
      }
    }
    return found;
  }

  const ring = () => points(selected ? [selected] : [], {
    name: "shown below", hoverinfo: "skip",
    marker: { symbol: "circle-open", size: 18, color: colour("orange"), line: { width: 2.5 } },
  });

  function traces() {
    const other = (test) => data.others.filter((trial) => !trial.pruned && test(trial));
    const steps = pairFront();
    const made = [
      points(data.others.filter((trial) => trial.pruned), {
        name: "stopped early (extrapolated)", marker: { symbol: "x-thin-open", size: 6, color: colour("grey") } }),
      points(other((trial) => trial.source !== "knapsack"), {
        name: "trials", marker: { symbol: "circle", size: 6, color: colour("grey"), opacity: 0.7 } }),
      points(other((trial) => trial.source === "knapsack"), {
        name: "the knapsack's starts", marker: { symbol: "square", size: 7, color: colour("orange") } }),
      { type: "scatter", mode: "lines+markers", name: "front of the two shown", hoverinfo: "skip",
        x: steps.map((end) => end[0]), y: steps.map((end) => end[1]), line: { color: colour("blue"), width: 1.2, shape: "hv" },
        marker: { symbol: "circle-open", size: 13, color: colour("blue"), line: { width: 1 } } },
      points(data.front, { name: "front of all objectives", marker: { symbol: "circle", size: 9, color: colour("blue") } }),
      points(chosen ? [chosen] : [], {
        name: "chosen", hoverinfo: "skip", marker: { symbol: "diamond-open", size: 15, color: colour("black"), line: { width: 2 } } }),
    ];
    return [...made.filter((trace) => trace.x.length), ring()];
  }

  function budgets() {
    const line = { color: colour("green"), dash: "dash", width: 1.5 }, shapes = [], annotations = [];
    selects.forEach((select, i) => {
      const { bound } = data.axes[select.value];
      if (bound === null) return;
      const [along, across] = i ? ["y", "x"] : ["x", "y"];
      shapes.push({ type: "line", layer: "below", line, [`${across}ref`]: "paper", [`${across}0`]: 0, [`${across}1`]: 1,
        [`${along}0`]: bound, [`${along}1`]: bound });
      annotations.push({ text: "budget", showarrow: false, font: { color: "#00724f" }, [along]: bound, [across]: 1 - i,
        [`${across}ref`]: "paper", xanchor: "left", yanchor: i ? "bottom" : "top" });
    });
    return { shapes, annotations };
  }

  function axis(select) {
    const { name, label } = data.axes[select.value];
    const positive = [...data.front, ...data.others].every((trial) => trial.values[select.value] > 0);
    const log = name === "divergence" && positive ? { type: "log", exponentformat: "power", dtick: 1 } : {};
    return { title: { text: plain(clipped(label, 48)) }, ...log };
  }

  function draw() {
    Plotly.react(plot, traces(), layout({ xaxis: axis(axisX), yaxis: axis(axisY), ...budgets() }), CONFIG);
  }

  function select(trial) {
    selected = trial;
    show(trial);
    const last = plot.data.length - 1, now = ring();
    Plotly.restyle(plot, { x: [now.x], y: [now.y] }, [last]);
  }

  let before = selects.map((side) => side.value);
  selects.forEach((side, i) => side.addEventListener("change", () => {
    if (axisX.value === axisY.value) selects[1 - i].value = before[i];
    before = selects.map((one) => one.value);
    draw();
  }));
  draw();
  plot.on("plotly_click", (event) => select(event.points[0].customdata));
  if (selected) show(selected);
  for (const button of document.querySelectorAll("button.pick")) {
    button.addEventListener("click", () => {
      select(data.front[button.dataset.candidate]);
      panel.focus();
      panel.scrollIntoView({ block: "nearest" });
    });
  }

  // ---- all other plots, each when it comes near ----
  function drawFigure(place) {
    if (place.dataset.drawn) return;
    place.dataset.drawn = "yes";
    const figure = data.figures[place.dataset.picture][place.dataset.number];
    Plotly.newPlot(place, figure.data, layout(figure.layout), CONFIG);
  }
  const places = [...document.querySelectorAll(".plot")];
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((one) => one.isIntersecting)) drawFigure(entry.target);
  }, { rootMargin: "600px" });
  places.forEach((place) => near.observe(place));
  window.addEventListener("beforeprint", () => {
    places.forEach(drawFigure);
    for (const details of document.querySelectorAll("details")) details.open = true;
  });
})();
