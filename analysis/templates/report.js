"use strict";
// The page's behaviour: theme, plots, the table of trials, copying, printing. No part of it asks a network for anything.
(() => {
  const root = document.documentElement;
  const plots = new Map();

  // ---- what the page carries: compressed, so that 100 000 trials still open
  async function inflated(name) {
    const text = atob(document.getElementById(`packed-${name}`).textContent.trim());
    const bytes = new Uint8Array(text.length);
    for (let place = 0; place < text.length; place += 1) bytes[place] = text.charCodeAt(place);
    const opened = new DecompressionStream("gzip");
    const writer = opened.writable.getWriter();  // a Blob's stream would count as a request, which the page forbids
    writer.write(bytes);
    writer.close();
    const decoder = new TextDecoder();
    const parts = [];
    const reader = opened.readable.getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return parts.join("") + decoder.decode();
      parts.push(decoder.decode(value, { stream: true }));
    }
  }

  function runScript(text) {
    const script = document.createElement("script");
    script.textContent = text;
    document.head.append(script);
  }

  // ---- theme
  const system = matchMedia("(prefers-color-scheme: dark)");
  const themeButton = document.getElementById("theme");
  const THEMES = ["auto", "light", "dark"];
  let printing = false;

  function remembered() {
    try { return localStorage.getItem("tunebench-theme"); } catch { return null; }  // refused for files by some browsers
  }

  function isDark() {
    if (printing) return false;
    const chosen = root.dataset.theme;
    return chosen === "dark" || (chosen !== "light" && system.matches);
  }

  function setTheme(theme) {
    if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
    themeButton.textContent = `Theme: ${theme}`;
    try { localStorage.setItem("tunebench-theme", theme); } catch { /* the choice lasts as long as the page */ }
    redrawAll();
  }

  // ---- plots
  let charts = {};
  let darkOf = {};

  function coloured(part, dark) {
    if (Array.isArray(part)) return part.length && typeof part[0] === "number" ? part : part.map((item) => coloured(item, dark));
    if (part && typeof part === "object") {
      return Object.fromEntries(Object.entries(part).map(([key, value]) => [key, coloured(value, dark)]));
    }
    if (dark && typeof part === "string" && part[0] === "#") return (darkOf[part.slice(0, 7)] || part.slice(0, 7)) + part.slice(7);
    return part;
  }

  function layoutOf(chart, place) {
    const style = getComputedStyle(place);
    const width = place.clientWidth || 700;
    const layout = structuredClone(width < 620 ? chart.narrow : chart.wide);
    const line = printing ? "#d5d8dc" : style.borderTopColor;  // the event comes before the colours of paper
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis/.test(key)) {
        Object.assign(layout[key], { gridcolor: line, linecolor: line, showline: true, ticks: "", fixedrange: false });
        const words = layout.yaxis.ticktext && !layout.yaxis.type;  // arms on the vertical axis: read across
        layout[key].showgrid = (key[0] === "x") === Boolean(words);
      }
    }
    return Object.assign(layout, {
      width,
      font: { family: style.fontFamily, size: 13, color: printing ? "#1b1d20" : style.color },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      hoverlabel: { align: "left" },
    });
  }

  function draw(name) {
    const place = plots.get(name);
    const chart = charts[name];
    const options = { displaylogo: false, responsive: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "toImage"] };
    place.querySelector(".waiting")?.remove();
    const done = Plotly.react(place, coloured(chart.data, isDark()), layoutOf(chart, place), options);
    place.dataset.drawn = "yes";
    return done;
  }

  const idle = window.requestIdleCallback || ((work) => setTimeout(work, 1));

  function redrawAll() {
    for (const [name, place] of plots) if (place.dataset.drawn) draw(name);
  }

  async function drawAll() {
    for (const name of plots.keys()) {
      if (!plots.get(name).dataset.drawn) {
        await new Promise((next) => idle(next, { timeout: 200 }));
        await draw(name);
      }
    }
    root.dataset.plots = "drawn";
  }

  async function startPlots() {
    document.querySelectorAll(".plot").forEach((place) => plots.set(place.dataset.chart, place));
    const content = JSON.parse(await inflated("charts"));
    charts = content.charts;
    darkOf = content.dark;
    if (plots.size) runScript(await inflated("plotly"));
    await drawAll();
  }

  // ---- the table of trials
  const PER_PAGE = 25;

  function startTable(table) {
    const count = table.config.length;
    const word = (column, row) => table.names[column][table[column][row]];
    const idOf = (row) => [
      word("workload", row), word("optimizer", row), word("stage", row),
      `c${String(table.config[row]).padStart(3, "0")}`, `s${table.seed[row]}`,
    ].join(".");
    const settingsOf = (row) => {
      const names = table.params[word("optimizer", row)];
      return table.values[row].map((value, place) => (value === null ? "" : `${names[place]} ${value}`)).filter(Boolean).join(", ");
    };
    const columns = [
      { name: "trial", text: idOf, kind: "mono" },
      { name: "stage", text: (row) => word("stage", row) },
      { name: "steps", value: (row) => table.steps[row] },
      { name: "objective", value: (row) => table.objective[row] },
      { name: "device-seconds", value: (row) => table.device_s[row] },
      { name: "ended", text: (row) => word("ended", row), below: (row) => table.why[row] },
      { name: "hyperparameters", text: settingsOf, kind: "wide" },
    ];
    const head = document.querySelector("#trials-table thead tr");
    const body = document.querySelector("#trials-table tbody");
    const told = document.getElementById("trials-told");
    const search = document.getElementById("trials-search");
    const filters = ["workload", "optimizer", "stage", "ended"].map((column) => {
      const select = document.getElementById(`trials-${column}`);
      table.names[column].forEach((name, place) => select.add(new Option(name, place)));
      return { column, select };
    });
    let shown = Uint32Array.from({ length: count }, (_, row) => row);
    let order = null;  // { column, descending }
    let page = 0;
    let haystack = null;

    function matching() {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const wanted = filters.filter(({ select }) => select.value !== "").map(({ column, select }) => [table[column], Number(select.value)]);
      if (words.length && !haystack) {
        haystack = Array.from({ length: count }, (_, row) => `${idOf(row)} ${word("ended", row)} ${table.why[row]} ${settingsOf(row)}`.toLowerCase());
      }
      const rows = [];
      for (let row = 0; row < count; row += 1) {
        if (wanted.every(([places, place]) => places[row] === place) && words.every((part) => haystack[row].includes(part))) rows.push(row);
      }
      return Uint32Array.from(rows);
    }

    function sorted(rows) {
      if (!order) return rows;
      const { column, descending } = order;
      const sign = descending ? -1 : 1;
      if (column.value) {
        const numberOf = (row) => { const value = column.value(row); return value === "inf" ? Infinity : value === null || value === undefined ? NaN : Number(value); };
        const keys = new Map(Array.from(rows, (row) => [row, numberOf(row)]));
        return rows.sort((a, b) => {  // what has no number comes last in both directions
          const [x, y] = [keys.get(a), keys.get(b)];
          if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y) || a - b;
          return x === y ? a - b : sign * (x < y ? -1 : 1);
        });
      }
      const keys = new Map(Array.from(rows, (row) => [row, column.text(row)]));
      return rows.sort((a, b) => { const [x, y] = [keys.get(a), keys.get(b)]; return x === y ? a - b : sign * (x < y ? -1 : 1); });
    }

    function cell(column, row) {
      const data = document.createElement("td");
      if (column.value) {
        const value = column.value(row);
        data.className = "n";
        data.textContent = value === null || value === undefined ? "–" : value === "inf" ? "∞" : value;
      } else {
        data.className = column.kind || "";
        data.textContent = column.text(row);
        if (column.below) {
          const below = document.createElement("span");
          below.className = "interval";
          below.textContent = column.below(row);
          data.append(below);
        }
      }
      return data;
    }

    function render() {
      const pages = Math.max(1, Math.ceil(shown.length / PER_PAGE));
      page = Math.min(Math.max(page, 0), pages - 1);
      const rows = shown.subarray(page * PER_PAGE, (page + 1) * PER_PAGE);
      body.replaceChildren(...Array.from(rows, (row) => {
        const line = document.createElement("tr");
        line.append(...columns.map((column) => cell(column, row)));
        return line;
      }));
      const from = shown.length ? page * PER_PAGE + 1 : 0;
      told.textContent = `${from} to ${page * PER_PAGE + rows.length} of ${shown.length} trials` + (shown.length < count ? ` (${count} in all)` : "");
      document.getElementById("trials-first").disabled = document.getElementById("trials-back").disabled = page === 0;
      document.getElementById("trials-next").disabled = document.getElementById("trials-last").disabled = page === pages - 1;
    }

    function refresh() {
      shown = sorted(matching());
      page = 0;
      render();
    }

    columns.forEach((column) => {
      const header = document.createElement("th");
      header.scope = "col";
      header.setAttribute("aria-sort", "none");
      if (column.value) header.className = "n";
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = column.name;
      button.addEventListener("click", () => {
        order = { column, descending: order?.column === column && !order.descending };
        head.querySelectorAll("th").forEach((other) => other.setAttribute("aria-sort", "none"));
        header.setAttribute("aria-sort", order.descending ? "descending" : "ascending");
        refresh();
      });
      header.append(button);
      head.append(header);
    });
    const move = { first: () => 0, back: () => page - 1, next: () => page + 1, last: () => Infinity };
    for (const [name, to] of Object.entries(move)) {
      document.getElementById(`trials-${name}`).addEventListener("click", () => { page = Math.min(to(), shown.length); render(); });
    }
    let waiting = 0;
    search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(refresh, 120); });
    filters.forEach(({ select }) => select.addEventListener("change", refresh));
    document.getElementById("trials-clear").addEventListener("click", () => {
      search.value = "";
      filters.forEach(({ select }) => { select.value = ""; });
      refresh();
    });
    render();
    root.dataset.table = "ready";
  }

  // ---- copying
  async function copy(button) {
    const source = document.getElementById(button.dataset.copies);
    const told = button.parentElement.querySelector("[role=status]");
    try {
      await navigator.clipboard.writeText(source.textContent);
      told.textContent = "Copied.";
    } catch {
      getSelection().selectAllChildren(source);  // browsers that keep the clipboard from files
      told.textContent = document.execCommand("copy") ? "Copied." : "Selected; copy it with your keyboard.";
    }
  }

  // ---- printing: light, wide open, plots as wide as the paper
  function beforePrint() {
    if (printing) return;
    printing = true;
    document.querySelectorAll("details:not([open])").forEach((part) => { part.open = true; part.dataset.printed = "yes"; });
    for (const [name, place] of plots) { place.style.width = "660px"; if (window.Plotly) draw(name); }
  }

  function afterPrint() {
    printing = false;
    document.querySelectorAll("details[data-printed]").forEach((part) => { part.open = false; delete part.dataset.printed; });
    for (const place of plots.values()) place.style.width = "";
    redrawAll();
  }

  function showTarget() {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const closed = target && target.closest("details:not([open])");
    if (closed) { closed.open = true; target.scrollIntoView(); }
  }

  const chosen = remembered();
  themeButton.hidden = false;
  setTheme(THEMES.includes(chosen) ? chosen : "auto");
  themeButton.addEventListener("click", () => {
    setTheme(THEMES[(THEMES.indexOf(root.dataset.theme || "auto") + 1) % THEMES.length]);
  });
  system.addEventListener("change", redrawAll);
  document.querySelectorAll("button[data-copies]").forEach((button) => button.addEventListener("click", () => copy(button)));
  addEventListener("beforeprint", beforePrint);
  addEventListener("afterprint", afterPrint);
  addEventListener("hashchange", showTarget);
  let resized = 0;
  let lastWidth = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === lastWidth || printing) return;
    lastWidth = innerWidth;
    clearTimeout(resized);
    resized = setTimeout(redrawAll, 150);
  });
  showTarget();
  if (window.DecompressionStream) {
    inflated("trials").then((text) => startTable(JSON.parse(text)));
    startPlots();
  } else {
    document.getElementById("trials-told").textContent = "This browser is too old to unpack the trials; see tables/trials.csv.";
  }
})();
