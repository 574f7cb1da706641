// curves -----------------------------------------------------------------------------------------
const FIRST = ["reward", "eval/accuracy", "process/outcome_mean", "kl", "entropy", "completions/mean_length",
  "process/gamma", "process/thinking_weight", "clip_ratio/region_mean", "completions/clipped_ratio", "rows/live",
  "loss", "grad_norm", "reward_std", "frac_reward_zero_std", "learning_rate", "step_time"];
const SCHEDULED = ["learning_rate", "process/thinking_weight", "num_tokens"]; // not noise: never smoothed
const PHASE = "time/", PHASES = ["rollout", "score", "update", "reward_update", "eval", "save"];

function series(run, name) {
  const rows = name.startsWith("eval/") ? run.evals : run.metrics, error = name + "_se";
  return rows.filter((r) => Number.isFinite(r[name]) && Number.isFinite(r.step)).map((r) =>
    ({ x: r.step, y: r[name], e: Number.isFinite(r[error]) ? 1.96 * r[error] : 0 }));
}
function smooth(points, width) {
  // The trailing mean over `width` steps, and 1.96 standard errors of it.
  let sum = 0, squares = 0;
  const zero = mean(points.map((p) => p.y)) || 0;
  return points.map((p, i) => {
    const out = i >= width ? points[i - width].y - zero : 0, n = Math.min(i + 1, width);
    sum += p.y - zero - out; squares += (p.y - zero) ** 2 - out ** 2;
    const spread = n > 2 ? Math.max(0, (squares - sum * sum / n) / (n - 1)) : 0;
    return { x: p.x, y: zero + sum / n, e: 1.96 * Math.sqrt(spread / n) };
  });
}
function names() {
  const all = new Set();
  for (const run of data.runs) {
    for (const r of run.metrics) for (const k of Object.keys(r)) if (!k.startsWith("eval/")) all.add(k);
    for (const r of run.evals) for (const k of Object.keys(r)) if (k.startsWith("eval/")) all.add(k);
  }
  all.delete("step");
  const rank = (n) => { const i = FIRST.indexOf(n); return i >= 0 ? i : n.startsWith("process/") ? 50 : n.startsWith("monitor/") || n.startsWith("canary/") ? 55 : n.startsWith("eval/") ? 60 : n.startsWith(PHASE) ? 90 : 70; };
  return [...all].filter((n) => !n.endsWith("_se")).sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
}
function frame(name, xs, low, high) {
  const width = 300, height = 120, left = 52, bottom = 16;
  const x0 = least(xs), x1 = most(xs), pad = (high - low || Math.abs(high) || 1) * 0.06;
  const X = (x) => left + (x1 > x0 ? (x - x0) / (x1 - x0) : 0.5) * (width - left - 6);
  const Y = (y) => 6 + (1 - (y - low + pad) / (high - low + 2 * pad)) * (height - bottom - 6);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0 });
  svg.append(draw("line", { class: "axis", x1: left, x2: width - 6, y1: height - bottom, y2: height - bottom }));
  for (const v of high > low ? [low, high] : [low]) svg.append(draw("text", { x: left - 4, y: Y(v) + 3, "text-anchor": "end" }, short(v)));
  svg.append(draw("text", { x: left, y: height - 4 }, String(x0)), draw("text", { x: width - 6, y: height - 4, "text-anchor": "end" }, String(x1)));
  const at = (clientX) => { const box = svg.getBoundingClientRect(); return x0 + ((clientX - box.left) / box.width * width - left) / (width - left - 6) * (x1 - x0); };
  return { svg, X, Y, at, x0, x1, top: 6, bottom: height - bottom, width };
}
function follow(f, name, xs, say) {
  // A cursor at the nearest step, by mouse or by the arrow keys; `say(x)` is what it tells.
  const places = [...new Set(xs)].sort((a, b) => a - b), last = say(places[places.length - 1]);
  const cursor = draw("line", { class: "axis", y1: f.top, y2: f.bottom, visibility: "hidden" });
  f.svg.append(cursor);
  f.svg.setAttribute("aria-label", `${name}. ${last.replaceAll("\n", ", ")}`);
  let now = places.length - 1;
  function show(x, y) {
    cursor.setAttribute("x1", f.X(places[now])); cursor.setAttribute("x2", f.X(places[now])); cursor.setAttribute("visibility", "visible");
    tip(x, y, say(places[now]));
  }
  function key() {
    const box = f.svg.getBoundingClientRect();
    show(box.left + f.X(places[now]) / f.width * box.width, box.top + 10);
    f.svg.setAttribute("aria-label", `${name}. ${say(places[now]).replaceAll("\n", ", ")}`);
  }
  const hide = () => { cursor.setAttribute("visibility", "hidden"); tip(); };
  f.svg.addEventListener("mousemove", (event) => {
    const x = f.at(event.clientX);
    now = places.reduce((best, p, i) => Math.abs(p - x) < Math.abs(places[best] - x) ? i : best, 0);
    show(event.clientX, event.clientY);
  });
  f.svg.addEventListener("mouseleave", hide);
  f.svg.addEventListener("blur", hide);
  f.svg.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9 }[event.key];
    if (!by) return;
    now = Math.max(0, Math.min(places.length - 1, now + by));
    key(); event.preventDefault();
  });
}
const line = (f, ps) => ps.map((p, j) => `${j ? "L" : "M"}${f.X(p.x).toFixed(1)} ${f.Y(p.y).toFixed(1)}`).join("");
function area(f, up, down, colour, opacity) {
  return draw("path", { d: line(f, up) + line(f, down.slice().reverse()).replace("M", "L") + "Z", fill: colour, opacity });
}
function chart(name) {
  const window = +$("smooth").value, exact = name.startsWith("eval/") || SCHEDULED.includes(name);
  const lines = data.runs.map((run) => series(run, name));
  const soft = lines.map((points) => exact || window < 2 ? points : smooth(points, window));
  const flat = [...lines.flat(), ...soft.flat()];
  if (!flat.length) return null;
  const xs = flat.map((p) => p.x);
  const f = frame(name, xs, least(flat.map((p) => p.y - p.e)), most(flat.map((p) => p.y + p.e)));
  soft.forEach((points, i) => {
    if (!points.length) return;
    const colour = COLOURS[i % COLOURS.length];
    if (points.some((p) => p.e)) f.svg.append(area(f, points.map((p) => ({ x: p.x, y: p.y + p.e })), points.map((p) => ({ x: p.x, y: p.y - p.e })), colour, 0.16));
    if (!exact && window > 1) f.svg.append(draw("path", { d: line(f, lines[i]), fill: "none", stroke: colour, opacity: 0.25 }));
    f.svg.append(draw("path", { d: line(f, points), fill: "none", stroke: colour, "stroke-width": 1.7 }));
    if (points.length < 25) for (const p of points) f.svg.append(draw("circle", { cx: f.X(p.x), cy: f.Y(p.y), r: 2, fill: colour }));
  });
  const last = lines.map((p) => p.length ? short(p[p.length - 1].y) : "").filter(Boolean).join(" · ");
  follow(f, name, xs, (x) => {
    const said = soft.map((ps, i) => {
      const n = ps.findIndex((p) => p.x === x);
      if (n < 0) return "";
      const raw = exact || window < 2 ? "" : ` (this step ${short(lines[i][n].y)})`;
      return `${data.runs[i].name}: ${short(ps[n].y)}${ps[n].e ? " ± " + short(ps[n].e) : ""}${raw}`;
    });
    return [`step ${x}`, ...said.filter(Boolean)].join("\n");
  });
  return make("div", { class: "chart" }, make("h2", {}, name, make("span", {}, last)), f.svg);
}
function split(run) {
  // Where the seconds of a step went: phases on top of one another.
  const rows = run.metrics.filter((r) => Object.keys(r).some((k) => k.startsWith(PHASE)));
  const phases = [...new Set(rows.flatMap((r) => Object.keys(r).filter((k) => k.startsWith(PHASE))))];
  if (!rows.length) return null;
  const place = (k) => PHASES.indexOf(k.slice(5)) + 1 || PHASES.length + 1;
  phases.sort((a, b) => place(a) - place(b) || a.localeCompare(b));
  const of = (r, n) => phases.slice(0, n).reduce((sum, k) => sum + (r[k] || 0), 0);
  const xs = rows.map((r) => r.step), f = frame("", xs, 0, most(rows.map((r) => of(r, phases.length))));
  const colour = (i) => COLOURS[i % COLOURS.length];
  phases.forEach((_, i) => f.svg.append(area(f, rows.map((r) => ({ x: r.step, y: of(r, i + 1) })), rows.map((r) => ({ x: r.step, y: of(r, i) })), colour(i), 0.75)));
  follow(f, "time split", xs, (x) => {
    const row = rows.find((r) => r.step === x), whole = of(row, phases.length) || 1;
    return [`step ${x}`, ...phases.map((k) => `${k.slice(5)}: ${short(row[k] || 0)} s, ${Math.round(100 * (row[k] || 0) / whole)} %`)].join("\n");
  });
  const key = make("p", { class: "phases" }, ...phases.map((k, i) => { const mark = make("i"); mark.style.background = colour(i); return make("span", { class: "key" }, mark, k.slice(5)); }));
  const title = "seconds of a step by phase" + (data.runs.length > 1 ? ": " + run.name : "");
  return make("div", { class: "chart", "data-split": "" }, make("h2", {}, title), f.svg, key);
}
function curves() {
  const wanted = $("metric").value.trim().toLowerCase();
  const made = names().filter((n) => n.toLowerCase().includes(wanted)).map(chart).filter(Boolean);
  if ("time seconds phase".includes(wanted)) made.splice(12, 0, ...data.runs.map(split).filter(Boolean));
  const none = names().length ? "No metric has this in its name." : "No numbers yet: the run has not finished a step.";
  $("charts").replaceChildren(...(made.length ? made : [make("p", { class: "empty" }, none)]));
  $("legend").replaceChildren(...(data.runs.length > 1 ? data.runs.map((r, i) => {
    const mark = make("i"); mark.style.background = COLOURS[i % COLOURS.length];
    return make("span", { class: "key" }, mark, r.name);
  }) : []));
}

