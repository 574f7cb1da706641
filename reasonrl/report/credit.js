// step credit ------------------------------------------------------------------------------------
const run = () => data.runs[state.run];
const known = (g) => g.rows.map((r) => r.outcome).filter((v) => v !== null);
const right = (g) => known(g).filter((v) => v >= 0.5).length;
const spread = (v) => { const m = mean(v); return v.length ? Math.sqrt(mean(v.map((x) => (x - m) ** 2))) : -1; };
function disagrees(row) {
  const steps = row.parts.map((p) => p[1]).filter((v) => v !== null);
  if (!steps.length || row.outcome === null) return null;
  const clean = least(steps) >= 0.5, good = row.outcome >= 0.5;
  return clean === good ? null : good ? "right, with a step marked wrong" : "wrong, with every step marked right";
}
function text(g) {
  g.low ??= [g.prompt || g.id || "", ...g.rows.map((r) => r.parts.map((p) => p[0]).join(""))].join("\n").toLowerCase();
  return g.low;
}
function chosenGroups() {
  const step = run().steps.find((s) => s.step === state.step);
  if (!step) return [];
  const wanted = $("search").value.toLowerCase(), filter = $("filter").value, sort = $("sort").value;
  const groups = step.groups.filter((g) => {
    const v = known(g);
    if (filter === "mixed" && !(v.some((x) => x >= 0.5) && v.some((x) => x < 0.5))) return false;
    if (filter === "disagree" && !g.rows.some(disagrees)) return false;
    if (filter === "unknown" && v.length === g.rows.length) return false;
    return !wanted || text(g).includes(wanted);
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
function token(row, at) {
  // The token at a place of the text, as words.
  const t = row.tokens;
  let n = 0;
  for (let end = 0; n < t.n.length && (end += t.n[n]) <= at;) n += 1;
  return n < t.n.length ? `token ${n + 1}: ${numbers(t, [n])}` : "";
}
function numbers(t, which) {
  // The mean over some tokens: log-prob when drawn, ratio in the update, clipped there or not.
  const said = [`log-prob ${short(+mean(which.map((n) => -t.l[n] / 100)).toFixed(3))}`];
  if (t.r === undefined) return said[0] + ", ratio not stored";
  const ratio = t.r === 1 ? which.map(() => 1) : which.map((n) => t.r[n]).filter((v) => v !== null).map((v) => v / 1000);
  if (!ratio.length) return said[0] + ", not in the update (no credit)";
  const cut = new Set(t.c || []), clipped = which.filter((n) => cut.has(n)).length;
  said.push(`ratio ${short(+mean(ratio).toFixed(3))}`);
  said.push(which.length > 1 ? `${clipped} of ${which.length} clipped` : clipped ? "clipped" : "not clipped");
  return said.join(", ");
}
function inside(row, from, to) {
  const out = [];
  for (let n = 0, at = 0; n < row.tokens.n.length; at += row.tokens.n[n], n += 1) if (at >= from && at < to) out.push(n);
  return out;
}
function place(event, node) {
  // Which character of a text is under the pointer: the nearest gap, by the standard's way or else
  // WebKit's, then the side of it.
  const x = event.clientX, y = event.clientY, old = document.caretPositionFromPoint ? null : document.caretRangeFromPoint?.(x, y);
  const at = document.caretPositionFromPoint?.(x, y) ?? (old && { offsetNode: old.startContainer, offset: old.startOffset });
  if (!at || at.offsetNode !== node) return null;
  const left = document.createRange();
  left.setStart(node, Math.max(0, at.offset - 1)); left.setEnd(node, at.offset);
  const over = [...left.getClientRects()].some((r) => x >= r.left && x < r.right && y >= r.top && y <= r.bottom);
  return over ? at.offset - 1 : at.offset;
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
  const box = make("div", { class: "text", tabindex: "0", role: "group", "aria-label": "completion; left and right go through its steps" });
  let n = 0, at = 0;
  for (const [piece, reward, advantage] of row.parts) {
    const span = make("span", { class: "part" }, piece), from = at;
    at += piece.length;
    if (reward !== null || advantage !== null) {
      n += 1;
      let about = `step ${n}\nstep reward: ${short(reward)}\nadvantage of its tokens: ${short(advantage)}`;
      const which = row.tokens ? inside(row, from, at) : [];
      if (which.length) about += `\n${which.length} ${which.length > 1 ? "tokens" : "token"}: ${numbers(row.tokens, which)}`;
      span.dataset.n = n;
      span.dataset.about = about;
      span.tabIndex = -1;
      span.style.background = colour(state.by === "reward" ? reward : advantage, state.by, largest);
      span.setAttribute("aria-label", about.replaceAll("\n", ", ") + ": " + piece);
    }
    span.addEventListener("mousemove", (event) => {
      const offset = row.tokens ? place(event, span.firstChild) : null;
      tip(event.clientX, event.clientY, [span.dataset.about, offset === null ? "" : token(row, from + offset)].filter(Boolean).join("\n"));
    });
    span.addEventListener("mouseleave", () => tip());
    box.append(span);
  }
  if (!row.parts.length) box.append(make("span", { class: "empty" }, "(empty completion)"));
  return make("article", { class: "card" }, head, box);
}
function walk(event) {
  // Left and right inside a completion go from step to step.
  const box = event.target.closest?.(".text"), by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!box || !by) return false;
  const steps = [...box.querySelectorAll("[data-n]")];
  const next = steps[Math.max(0, Math.min(steps.length - 1, steps.indexOf(event.target) + by))];
  if (next) {
    next.focus();
    const at = next.getBoundingClientRect();
    tip(at.left, at.bottom - 10, next.dataset.about);
  }
  return true;
}
let shown = [], more = () => {};
function option(g) {
  const chosen = g.id === state.prompt;
  return make("button", {
    class: "prompt", role: "option", "aria-selected": String(chosen), tabindex: chosen ? "0" : "-1",
    onclick: () => pick(g),
  }, (g.prompt || g.id || "").slice(0, 160), make("small", {}, `${right(g)} of ${g.rows.length} right`));
}
function pick(g) {
  state.prompt = g.id;
  const at = shown.indexOf(g);
  while ($("prompts").querySelectorAll(".prompt").length <= at) more(200);
  [...$("prompts").querySelectorAll(".prompt")].forEach((b, i) => {
    b.setAttribute("aria-selected", String(i === at)); b.tabIndex = i === at ? 0 : -1;
    if (i === at) { b.focus(); b.scrollIntoView({ block: "nearest" }); }
  });
  group();
}
function choose(event) {
  // Up, down, Home, End in the list of prompts.
  const at = shown.findIndex((g) => g.id === state.prompt);
  const to = { ArrowUp: at - 1, ArrowDown: at + 1, Home: 0, End: shown.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  const g = shown[Math.max(0, Math.min(shown.length - 1, to))];
  if (g) pick(g);
}
function credit() {
  const steps = run().steps.map((s) => s.step), last = steps.length ? steps[steps.length - 1] : null;
  if (state.newest || !steps.includes(state.step)) state.step = last;
  $("step").replaceChildren(...steps.map((s) => make("option", { value: s, selected: s === state.step }, String(s))));
  $("run").replaceChildren(...data.runs.map((r, i) => make("option", { value: i, selected: i === state.run }, r.name)));
  $("runbox").hidden = data.runs.length < 2;
  shown = chosenGroups();
  if (!shown.some((g) => g.id === state.prompt)) state.prompt = shown.length ? shown[0].id : null;
  more = grow($("prompts"), shown, option, 200);
  const rows = shown.reduce((n, g) => n + g.rows.length, 0);
  $("count").textContent = shown.length ? `${shown.length} prompts, ${rows} completions` : "";
  if (!shown.length) $("prompts").append(make("p", { class: "empty" }, steps.length ? "Nothing matches." : "No completions are stored."));
  group();
}
function group() {
  const g = shown.find((x) => x.id === state.prompt);
  $("group").replaceChildren();
  tip();
  if (!g) return;
  const largest = most([1e-9, ...g.rows.map((r) => most(r.parts.map((p) => Math.abs(p[2] ?? 0))))]);
  const across = make("p", { class: "across" });
  const same = run().steps.map((s) => [s.step, s.groups.find((x) => x.id === g.id)]).filter((p) => p[1]);
  if (same.length > 1) across.append("the same prompt at step", ...same.slice(-60).map(([s, x]) =>
    make("button", { "aria-pressed": String(s === state.step), "data-to": s, onclick: () => { to(s); document.querySelector(`[data-to="${s}"]`)?.focus(); } },
      `${s}: ${right(x)}/${x.rows.length} right`)));
  const pictures = (g.images || []).filter((name) => run().images[name]).map((name, i) =>
    make("img", { src: run().images[name], alt: `image ${i + 1} of the prompt`, class: "picture" }));
  const cards = make("div", { class: "cards" });
  $("group").append(make("h2", {}, g.prompt || g.id || ""), ...pictures, make("p", { class: "across" }, `answer: ${g.answer ?? "none"}`), across, cards);
  grow(cards, g.rows, (r) => card(r, largest), 24);
}
function to(step) {
  const steps = run().steps;
  state.step = step;
  state.newest = steps.length > 0 && step === steps[steps.length - 1].step;
  credit();
}

