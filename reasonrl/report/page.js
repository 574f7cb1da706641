"use strict";
// The run page: curves, and how a step's reward became credit. Text is only ever set as text.
const $ = (id) => document.getElementById(id);
let data = JSON.parse($("data").textContent);
const COLOURS = ["#1f77d0", "#d9731a", "#2a9d5c", "#b5459b", "#7a6ff0", "#a0522d"];
const FIRST = ["eval/accuracy", "reward", "process/outcome_mean", "loss", "kl", "entropy", "grad_norm",
  "completions/mean_length", "completions/clipped_ratio", "clip_ratio/region_mean", "rows/live",
  "reward_std", "frac_reward_zero_std", "learning_rate", "step_time"];
const state = { run: 0, step: null, prompt: null, by: "reward" };

function make(tag, attributes = {}, ...children) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) {
    if (k === "class") e.className = v; else if (k.startsWith("on")) e.addEventListener(k.slice(2), v);
    else if (v !== null && v !== false) e.setAttribute(k, v === true ? "" : v);
  }
  for (const c of children) e.append(c);
  return e;
}
function draw(tag, attributes, ...children) {
  const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
  e.append(...children);
  return e;
}
const short = (v) => v === null || v === undefined ? "unknown"
  : v === 0 ? "0" : Math.abs(v) >= 1e5 || Math.abs(v) < 1e-3 ? v.toExponential(2) : String(+v.toPrecision(4));

// curves -----------------------------------------------------------------------------------------
function series(run, name) {
  const rows = name.startsWith("eval/") ? run.evals : run.metrics;
  const error = name + "_se";
  return rows.filter((r) => Number.isFinite(r[name]) && Number.isFinite(r.step)).map((r) =>
    ({ x: r.step, y: r[name], e: Number.isFinite(r[error]) ? 1.96 * r[error] : 0 }));
}
function smooth(points, width) {
  let sum = 0;
  return points.map((p, i) => {
    sum += p.y - (i >= width ? points[i - width].y : 0);
    return { ...p, y: sum / Math.min(i + 1, width) };
  });
}
function names() {
  const all = new Set();
  for (const run of data.runs) {
    for (const r of run.metrics) for (const k of Object.keys(r)) if (!k.startsWith("eval/")) all.add(k);
    for (const r of run.evals) for (const k of Object.keys(r)) if (k.startsWith("eval/")) all.add(k);
  }
  all.delete("step");
  const rank = (n) => { const i = FIRST.indexOf(n); return i >= 0 ? i : n.startsWith("process/") ? 50 : n.startsWith("monitor/") || n.startsWith("canary/") ? 55 : n.startsWith("eval/") ? 60 : n.startsWith("time/") ? 90 : 70; };
  return [...all].filter((n) => !n.endsWith("_se")).sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
}
function chart(name) {
  const width = 300, height = 120, left = 52, bottom = 16;
  const window = +$("smooth").value;
  const lines = data.runs.map((run) => series(run, name));
  const flat = lines.flat();
  if (!flat.length) return null;
  const xs = flat.map((p) => p.x), low = Math.min(...flat.map((p) => p.y - p.e)), high = Math.max(...flat.map((p) => p.y + p.e));
  const x0 = Math.min(...xs), x1 = Math.max(...xs), pad = (high - low || Math.abs(high) || 1) * 0.06;
  const X = (x) => left + (x1 > x0 ? (x - x0) / (x1 - x0) : 0.5) * (width - left - 6);
  const Y = (y) => 6 + (1 - (y - low + pad) / (high - low + 2 * pad)) * (height - bottom - 6);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": name });
  svg.append(draw("line", { class: "axis", x1: left, x2: width - 6, y1: height - bottom, y2: height - bottom }));
  for (const v of high > low ? [low, high] : [low]) svg.append(draw("text", { x: left - 4, y: Y(v) + 3, "text-anchor": "end" }, short(v)));
  svg.append(draw("text", { x: left, y: height - 4 }, String(x0)), draw("text", { x: width - 6, y: height - 4, "text-anchor": "end" }, String(x1)));
  lines.forEach((points, i) => {
    if (!points.length) return;
    const colour = COLOURS[i % COLOURS.length], soft = name.startsWith("eval/") ? points : smooth(points, window);
    const path = (ps) => ps.map((p, j) => `${j ? "L" : "M"}${X(p.x).toFixed(1)} ${Y(p.y).toFixed(1)}`).join("");
    if (points.some((p) => p.e)) {
      const up = points.map((p) => ({ ...p, y: p.y + p.e })), down = points.map((p) => ({ ...p, y: p.y - p.e })).reverse();
      svg.append(draw("path", { d: path(up) + path(down).replace("M", "L") + "Z", fill: colour, opacity: 0.15 }));
    }
    if (soft !== points && window > 1) svg.append(draw("path", { d: path(points), fill: "none", stroke: colour, opacity: 0.25 }));
    svg.append(draw("path", { d: path(soft), fill: "none", stroke: colour, "stroke-width": 1.7 }));
    if (soft.length < 25) for (const p of soft) svg.append(draw("circle", { cx: X(p.x), cy: Y(p.y), r: 2, fill: colour }));
  });
  const last = lines.map((p) => p.length ? short(p[p.length - 1].y) : "").filter(Boolean).join(" · ");
  const box = make("div", { class: "chart" }, make("h2", {}, name, make("span", {}, last)), svg);
  const cursor = draw("line", { class: "axis", y1: 6, y2: height - bottom, visibility: "hidden" });
  svg.append(cursor);
  svg.addEventListener("mousemove", (event) => {
    const at = svg.getBoundingClientRect(), x = x0 + ((event.clientX - at.left) / at.width * width - left) / (width - left - 6) * (x1 - x0);
    const near = lines.map((ps) => ps.length ? ps.reduce((a, b) => Math.abs(b.x - x) < Math.abs(a.x - x) ? b : a) : null);
    const hit = near.find(Boolean);
    cursor.setAttribute("x1", X(hit.x)); cursor.setAttribute("x2", X(hit.x)); cursor.setAttribute("visibility", "visible");
    tip(event, [`step ${hit.x}`, ...near.map((p, i) => p && `${data.runs[i].name}: ${short(p.y)}${p.e ? " ± " + short(p.e) : ""}`).filter(Boolean)].join("\n"));
  });
  svg.addEventListener("mouseleave", () => { cursor.setAttribute("visibility", "hidden"); tip(); });
  return box;
}
function curves() {
  const wanted = $("metric").value.trim().toLowerCase();
  const made = names().filter((n) => n.toLowerCase().includes(wanted)).map(chart).filter(Boolean);
  $("charts").replaceChildren(...(made.length ? made : [make("p", { class: "empty" }, "No numbers yet: the run has not finished a step.")]));
  $("legend").replaceChildren(...(data.runs.length > 1 ? data.runs.map((r, i) => {
    const mark = make("i"); mark.style.background = COLOURS[i % COLOURS.length];
    return make("span", { class: "key" }, mark, r.name);
  }) : []));
}

// step credit ------------------------------------------------------------------------------------
const run = () => data.runs[state.run];
const known = (g) => g.rows.map((r) => r.outcome).filter((v) => v !== null);
const mean = (v) => v.length ? v.reduce((a, b) => a + b, 0) / v.length : null;
const spread = (v) => { const m = mean(v); return v.length ? Math.sqrt(mean(v.map((x) => (x - m) ** 2))) : -1; };
function disagrees(row) {
  const steps = row.parts.map((p) => p[1]).filter((v) => v !== null);
  if (!steps.length || row.outcome === null) return null;
  const clean = Math.min(...steps) >= 0.5, right = row.outcome >= 0.5;
  return clean === right ? null : right ? "right, with a step marked wrong" : "wrong, with every step marked right";
}
function chosenGroups() {
  const step = run().steps.find((s) => s.step === state.step);
  if (!step) return [];
  const text = $("search").value.toLowerCase(), filter = $("filter").value, sort = $("sort").value;
  const groups = step.groups.filter((g) => {
    const v = known(g);
    if (filter === "mixed" && !(v.some((x) => x >= 0.5) && v.some((x) => x < 0.5))) return false;
    if (filter === "disagree" && !g.rows.some(disagrees)) return false;
    if (filter === "unknown" && v.length === g.rows.length) return false;
    return !text || (g.prompt || "").toLowerCase().includes(text) || g.rows.some((r) => r.parts.map((p) => p[0]).join("").toLowerCase().includes(text));
  });
  if (sort === "reward") groups.sort((a, b) => (mean(known(b)) ?? -1) - (mean(known(a)) ?? -1));
  if (sort === "spread") groups.sort((a, b) => spread(known(b)) - spread(known(a)));
  return groups;
}
function colour(value, by, largest) {
  if (value === null) return "";
  const x = by === "reward" ? Math.max(-1, Math.min(1, 2 * value - 1)) : Math.max(-1, Math.min(1, value / largest));
  return x >= 0 ? `rgba(31,119,208,${(0.1 + 0.45 * x).toFixed(3)})` : `rgba(224,112,20,${(0.1 - 0.5 * x).toFixed(3)})`;
}
function card(row, largest) {
  const flag = disagrees(row), badge = row.outcome === null ? "" : row.outcome >= 0.5 ? " good" : " bad";
  const head = make("p", {},
    make("span", { class: "badge" + badge, title: row.reason || "" }, row.outcome === null ? (row.kind || "unknown") : row.outcome >= 0.5 ? "right" : "wrong"),
    make("span", {}, `reward ${short(row.reward)}`),
    make("span", {}, `advantage ${short(row.advantage)}`));
  if (!row.finished) head.append(make("span", { class: "flag" }, "cut by the length limit"));
  if (flag) head.append(make("span", { class: "flag" }, flag));
  if (row.outcome === null && row.reason) head.append(make("span", {}, row.reason));
  const text = make("div", { class: "text", tabindex: "0" });
  let n = 0;
  for (const [piece, reward, advantage] of row.parts) {
    const span = make("span", { class: "part" }, piece);
    if (reward !== null || advantage !== null) {
      n += 1;
      const about = `step ${n}\nstep reward: ${short(reward)}\nadvantage of its tokens: ${short(advantage)}`;
      span.dataset.n = n;
      span.style.background = colour(state.by === "reward" ? reward : advantage, state.by, largest);
      span.addEventListener("mousemove", (event) => tip(event, about));
      span.addEventListener("mouseleave", () => tip());
      span.setAttribute("aria-label", about.replaceAll("\n", ", ") + ": " + piece);
    }
    text.append(span);
  }
  if (!row.parts.length) text.append(make("span", { class: "empty" }, "(empty completion)"));
  return make("article", { class: "card" }, head, text);
}
function credit() {
  const steps = run().steps.map((s) => s.step);
  if (!steps.includes(state.step)) state.step = steps.length ? steps[steps.length - 1] : null;
  $("step").replaceChildren(...steps.map((s) => make("option", { value: s, selected: s === state.step }, String(s))));
  $("run").replaceChildren(...data.runs.map((r, i) => make("option", { value: i, selected: i === state.run }, r.name)));
  $("runbox").hidden = data.runs.length < 2;
  const groups = chosenGroups();
  if (!groups.some((g) => g.id === state.prompt)) state.prompt = groups.length ? groups[0].id : null;
  $("prompts").replaceChildren(...groups.map((g) => make("button", {
    class: "prompt", role: "option", "aria-selected": String(g.id === state.prompt),
    onclick: () => { state.prompt = g.id; credit(); },
  }, (g.prompt || g.id || "").slice(0, 160), make("small", {}, `${known(g).filter((v) => v >= 0.5).length} of ${g.rows.length} right`))));
  if (!groups.length) $("prompts").append(make("p", { class: "empty" }, steps.length ? "Nothing matches." : "No completions are stored."));
  const group = groups.find((g) => g.id === state.prompt);
  $("group").replaceChildren();
  if (!group) return;
  const largest = Math.max(1e-9, ...group.rows.flatMap((r) => r.parts.map((p) => Math.abs(p[2] ?? 0))));
  const across = make("p", { class: "across" });
  const other = run().steps.filter((s) => s.step !== state.step && s.groups.some((g) => g.id === group.id));
  if (other.length) across.append("the same prompt at step", ...other.slice(0, 40).map((s) =>
    make("button", { onclick: () => { state.step = s.step; credit(); } }, String(s.step))));
  const pictures = (group.images || []).filter((name) => run().images[name]).map((name, i) =>
    make("img", { src: run().images[name], alt: `image ${i + 1} of the prompt`, class: "picture" }));
  $("group").append(make("h2", {}, group.prompt || group.id), ...pictures, make("p", { class: "across" }, `answer: ${group.answer ?? "none"}`), across,
    make("div", { class: "cards" }, ...group.rows.map((r) => card(r, largest))));
}

// the rest ---------------------------------------------------------------------------------------
function tip(event, text) {
  const box = $("tip");
  box.hidden = !text;
  if (!text) return;
  box.textContent = text;
  const x = Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8);
  const y = event.clientY + 18 + box.offsetHeight > innerHeight ? event.clientY - box.offsetHeight - 10 : event.clientY + 18;
  box.style.left = `${x}px`; box.style.top = `${y}px`;
}
function view(name) {
  for (const id of ["curves", "credit", "config"]) $(id).hidden = id !== name;
  for (const b of document.querySelectorAll("[data-view]")) b.setAttribute("aria-pressed", String(b.dataset.view === name));
  if (name === "credit") credit();
  history.replaceState(null, "", name === "curves" ? location.pathname : "#view=" + name);
}
function move(by) {
  const steps = run().steps.map((s) => s.step), at = steps.indexOf(state.step) + by;
  if (at >= 0 && at < steps.length) { state.step = steps[at]; credit(); }
}
function all() {
  $("title").textContent = data.runs.map((r) => r.name).join(", ");
  document.title = $("title").textContent + " · reasonrl";
  $("notes").textContent = data.runs.flatMap((r) => r.notes).join("\n");
  $("configs").replaceChildren(...data.runs.map((r) => make("div", {}, make("h2", {}, r.name), make("pre", {}, r.config))));
  curves();
  if (!$("credit").hidden) credit();
}
for (const b of document.querySelectorAll("[data-view]")) b.addEventListener("click", () => view(b.dataset.view));
for (const b of document.querySelectorAll("[data-by]")) b.addEventListener("click", () => {
  state.by = b.dataset.by;
  for (const o of document.querySelectorAll("[data-by]")) o.setAttribute("aria-pressed", String(o === b));
  credit();
});
for (const id of ["smooth", "metric"]) $(id).addEventListener("input", curves);
for (const id of ["filter", "sort"]) $(id).addEventListener("change", credit);
$("search").addEventListener("input", credit);
$("step").addEventListener("change", () => { state.step = +$("step").value; credit(); });
$("run").addEventListener("change", () => { state.run = +$("run").value; credit(); });
$("before").addEventListener("click", () => move(-1));
$("after").addEventListener("click", () => move(1));
$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
});
document.addEventListener("keydown", (event) => {
  if (["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName) || event.ctrlKey || event.altKey || event.metaKey) return;
  if ($("credit").hidden) return;
  if (event.key === "ArrowLeft") move(-1);
  if (event.key === "ArrowRight") move(1);
});
if (matchMedia("(prefers-color-scheme: dark)").matches) document.documentElement.dataset.theme = "dark";
all();
const asked = location.hash.replace("#view=", "");
view(["credit", "config"].includes(asked) ? asked : "curves");
if (data.live) setInterval(async () => {
  try {
    const answer = await fetch("/data.json");
    if (answer.ok) { data = { ...data, ...await answer.json() }; all(); }
  } catch (error) { $("notes").textContent = `the server does not answer (${error.message})`; }
}, 5000);
