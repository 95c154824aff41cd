"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);

  // Tooltips: the words are in the data, Vega says when and where.
  const tip = $("tip");
  const tooltip = (_handler, event, _item, value) => {
    tip.hidden = value === null || value === undefined || value === "";
    if (tip.hidden) return;
    tip.textContent = String(value);
    const width = tip.offsetWidth;
    tip.style.left = `${Math.max(8, Math.min(event.clientX + 12, innerWidth - width - 8))}px`;
    tip.style.top = `${Math.max(8, event.clientY - tip.offsetHeight - 12)}px`;
  };
  const draw = (id, spec, ready = () => {}) => {
    if (!window.vegaEmbed || !spec || !$(id)) return;
    vegaEmbed($(id), spec, { renderer: "svg", actions: false, tooltip, logLevel: 1 }).then((drawn) => ready(drawn.view));
  };
  draw("sites", data.sites);

  const amount = (value, unit) => {
    const three = (number) => String(Number(number.toPrecision(3)));
    if (unit === "latency") return value < 1 ? `${three(value * 1e3)} ms` : `${three(value)} s`;
    const step = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "K"]].find(([size]) => value >= size * 0.9995);
    const text = step ? `${three(value / step[0])}${step[1]}` : three(value);
    return unit === "size" ? `${text}B` : text;
  };
  const exact = { params: (v) => `${v}`, macs: (v) => `${v}`, size: (v) => `${v}B`, latency: (v) => `${+(v * 1e3).toPrecision(4)}ms` };
  const quoted = (text) => (/^[\w@%+=:,./~-]+$/.test(text) ? text : `'${text.replace(/'/g, "'\\''")}'`);

  if (data.points) {
    let view = null;
    const slider = $("budget");
    const chosen = data.points.find((point) => point.kind === "chosen") || data.points[0];
    let unit = document.querySelector("input[name=unit]:checked").value;
    let range = [0, 1];

    const costed = () => data.points.filter((point) => point[unit] !== null);
    const budget = () => range[0] + ((range[1] - range[0]) * slider.value) / slider.max;
    const best = (limit) =>
      costed()
        .filter((point) => point[unit] <= limit * (1 + 1e-9))
        .sort((a, b) => b.rank - a.rank || a[unit] - b[unit])[0];

    const show = () => {
      const limit = budget();
      const point = best(limit);
      const told = `at most ${amount(limit, unit)}${unit === "params" ? " parameters" : unit === "macs" ? " MACs" : ""}`;
      $("budget-told").textContent = told;
      slider.setAttribute("aria-valuetext", told);
      const shown = $("shown");
      shown.textContent = "";
      const strong = document.createElement("strong");
      strong.textContent = point.label;
      shown.append(strong, document.createElement("br"), point.words);
      const command = { before: "# the model as it was: nothing to do", chosen: `# this one lies in ${data.directory}` }[point.kind]
        || data.command
          .replace("{directory}", quoted(data.directory))
          .replace("{target}", `${unit}:${exact[unit](point[unit])}`)
          .replace("{output}", quoted(`${data.directory.replace(/\/+$/, "")}-${unit}-${exact[unit](point[unit])}`));
      $("command").textContent = command;
      $("command-box").hidden = !data.command;
      document.querySelectorAll("#curve-table tbody tr").forEach((row) => row.classList.toggle("is-shown", Number(row.dataset.index) === point.index));
      if (view) view.signal("cost", unit).signal("budget", limit).signal("shown", point.index).runAsync();
    };
    const choose = (next) => {
      unit = next;
      const costs = costed().map((point) => point[unit]);
      range = [Math.min(...costs), Math.max(...costs)];
      slider.value = range[1] > range[0] ? Math.ceil(((chosen[unit] - range[0]) / (range[1] - range[0])) * slider.max - 1e-6) : slider.max;
      show();
    };
    slider.addEventListener("input", show);
    document.querySelectorAll("input[name=unit]").forEach((input) => input.addEventListener("change", () => choose(input.value)));
    choose(unit);
    draw("curve", data.curve, (drawn) => {
      view = drawn;
      show();
    });
  }

  document.querySelectorAll(".copy").forEach((button) =>
    button.addEventListener("click", async () => {
      const code = $(button.dataset.copy);
      try {
        await navigator.clipboard.writeText(code.textContent);
      } catch {
        // From a file some browsers allow only this older way.
        const selection = getSelection();
        selection.selectAllChildren(code);
        document.execCommand("copy");
        selection.removeAllRanges();
      }
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 1500);
    })
  );
})();
