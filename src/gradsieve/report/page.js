"use strict";
// The scatter: read the example under the pointer, a tap or the keyboard; change the axes; ring a group.
// Without this script the page still shows the figure, with the first choice beside it.
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const reader = byId("reader");
  if (!reader) return;
  const plot = document.querySelector(".cloud .plot");
  const field = plot.querySelector(".field");
  const part = (name) => reader.querySelector(`[data-field="${name}"]`);
  const rows = data.place.length;
  const near = { mouse: 24, touch: 40, pen: 32 }; // pixels
  let at = Number(reader.dataset.index);
  let held = false;
  let X, Y; // places of the rows: 0 to 1, upwards; NaN where a row has none

  const places = (key) => {
    const { low, high, log } = data.axes[key];
    const scale = log ? Math.log : (v) => v;
    const start = scale(low), length = scale(high) - start;
    return data.columns[key].map((v) => (v === null ? NaN : (scale(v) - start) / length));
  };
  const isPlaced = (i) => !Number.isNaN(X[i] + Y[i]);
  const dot = (i) => `M${(1000 * X[i]).toFixed(1)} ${(1000 - 1000 * Y[i]).toFixed(1)}h0`;
  const dots = (test) => {
    const path = [];
    for (let i = 0; i < rows; i++) if (isPlaced(i) && test(i)) path.push(dot(i));
    return path.join("");
  };

  const superscript = (n) => String(n).replace(/[-\d]/g, (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);
  const number = (v) => { // as wording.number writes it
    if (v === null || v === undefined) return "–";
    const size = Math.abs(v);
    let text;
    if (size !== 0 && (size < 1e-3 || size >= 1e7)) {
      const [mantissa, exponent] = v.toExponential(2).split("e");
      text = `${Number(mantissa)}×10${superscript(Number(exponent))}`;
    } else if (size >= 999.5) text = Math.round(v).toLocaleString("en");
    else text = String(Number(v.toPrecision(3)));
    return text.replace("-", "−");
  };
  const element = (tag, text, name) => {
    const made = document.createElement(tag);
    made.textContent = text;
    if (name) made.className = name;
    return made;
  };

  function show(i) {
    at = i;
    const place = data.place[i];
    const status = [element("span", place ? "Chosen" : "Not chosen", place ? "mark in" : "mark out")];
    if (place) status.push(` place ${place.toLocaleString("en")} of ${data.count.toLocaleString("en")}`);
    if (place && data.weight) status.push(`, weight ${number(data.weight[i])}`);
    if (data.group[i] !== null) status.push(" · ", element("bdi", data.group[i]));
    if (held) status.push(" · held");
    part("status").replaceChildren(...status);
    for (const name of ["id", "prompt", "completion"]) part(name).textContent = data[name][i] || "–";
    part("cut").hidden = !data.cut[i];
    part("values").replaceChildren(...data.shown.map(([key, name]) => {
      const pair = document.createElement("div");
      pair.append(element("dt", name), element("dd", number(data.columns[key][i])));
      return pair;
    }));
    reader.scrollTop = 0;
    reader.parentElement.classList.toggle("held", held);
    byId("cursor").setAttribute("class", place ? "cursor in" : "cursor");
    for (const path of byId("cursor").children) path.setAttribute("d", isPlaced(i) ? dot(i) : "");
  }

  function ticks(svg, axis, vertical) {
    const old = svg.querySelector("text");
    svg.replaceChildren(...axis.marks.map(([share, text]) => {
      const tick = old.cloneNode();
      tick.setAttribute(vertical ? "y" : "x", `${vertical ? 100 - share : share}%`);
      tick.textContent = text;
      return tick;
    }));
  }

  function draw() {
    const [x, y] = [byId("axis-x").value, byId("axis-y").value];
    X = places(x);
    Y = places(y);
    const opening = x === data.start[0] && y === data.start[1];
    byId("others").setAttribute("d", dots((i) => !data.place[i]));
    for (const name of ["halo", "chosen"]) byId(name).setAttribute("d", dots((i) => data.place[i]));
    ticks(plot.querySelector(".ticks-x"), data.axes[x], false);
    ticks(plot.querySelector(".ticks-y"), data.axes[y], true);
    plot.querySelector(".grid").setAttribute("d", data.axes[y].marks.map(([share]) => `M0 ${1000 - 10 * share}H1000`).join(""));
    for (const line of document.querySelectorAll(".cloud .canvas path.border, .scatter .of-start")) line.classList.toggle("off", !opening);
    byId("log-note").hidden = !(data.axes[x].log || data.axes[y].log);
    ring();
    show(at);
  }

  function ring() {
    const group = byId("ring") ? byId("ring").value : "";
    const path = group ? dots((i) => data.group[i] === group) : "";
    for (const id of ["ringed", "ringed-inner"]) byId(id).setAttribute("d", path);
  }

  // The nearest dot to a point of the field, within `reach` pixels.
  function nearest(event, reach) {
    const box = field.getBoundingClientRect();
    const px = event.clientX - box.left, py = event.clientY - box.top;
    let best = -1, least = reach * reach;
    for (let i = 0; i < rows; i++) {
      const dx = X[i] * box.width - px, dy = (1 - Y[i]) * box.height - py;
      const far = dx * dx + dy * dy;
      if (far < least) [best, least] = [i, far];
    }
    return best;
  }

  // The next dot in a direction: the nearest one inside the quarter of the plane that opens there.
  function next(right, up) {
    const box = field.getBoundingClientRect();
    let best = -1, least = Infinity;
    for (let i = 0; i < rows; i++) {
      const dx = (X[i] - X[at]) * box.width, dy = (Y[i] - Y[at]) * box.height;
      const ahead = right * dx + up * dy, aside = Math.abs(up * dx + right * dy);
      const onTop = dx === 0 && dy === 0 && right + up > 0 && i > at; // dots on one another are walked rightwards
      const far = ahead * ahead + aside * aside;
      if ((onTop || (ahead > 0 && aside <= ahead)) && far < least) [best, least] = [i, far];
    }
    return best;
  }

  field.addEventListener("pointermove", (event) => {
    if (held || event.pointerType === "touch") return;
    const found = nearest(event, near.mouse);
    if (found >= 0 && found !== at) show(found);
  });
  field.addEventListener("click", (event) => {
    const found = nearest(event, near[event.pointerType] || near.mouse);
    held = found >= 0 && !(held && found === at);
    show(found >= 0 ? found : at);
  });
  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
  field.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    let found = at;
    if (event.key in arrows) {
      found = next(...arrows[event.key]);
      held = held && found < 0;
    } else if (event.key === "Home") {
      found = data.place.indexOf(1);
    } else if (event.key === "Enter" || event.key === " ") {
      held = !held;
    } else if (event.key === "Escape") {
      held = false;
    } else {
      return;
    }
    event.preventDefault();
    show(found >= 0 ? found : at);
  });

  field.tabIndex = 0;
  field.setAttribute("role", "application");
  field.setAttribute("aria-roledescription", "scatter plot");
  field.setAttribute("aria-label", "Examples of the pool; arrow keys walk from dot to dot, Home goes to the first choice");
  field.setAttribute("aria-describedby", "scatter-text");
  for (const fixed of document.querySelectorAll(".cloud .fixed")) fixed.hidden = true;
  for (const id of ["axis-x", "axis-y", "how", "ring-label"]) if (byId(id)) byId(id).hidden = false;
  for (const id of ["axis-x", "axis-y"]) byId(id).addEventListener("change", draw);
  if (byId("ring")) byId("ring").addEventListener("change", ring);
  draw();
})();
