// the rest ---------------------------------------------------------------------------------------
function view(name) {
  for (const id of ["curves", "credit", "config"]) $(id).hidden = id !== name;
  for (const b of document.querySelectorAll("[data-view]")) b.setAttribute("aria-pressed", String(b.dataset.view === name));
  tip();
  if (name === "credit") credit();
  history.replaceState(null, "", name === "curves" ? location.pathname : "#view=" + name);
}
function move(by) {
  const steps = run().steps.map((s) => s.step), at = steps.indexOf(state.step) + by;
  if (at >= 0 && at < steps.length) to(steps[at]);
}
function all() {
  $("title").textContent = data.runs.map((r) => r.name).join(", ");
  document.title = $("title").textContent + " · reasonrl";
  $("notes").textContent = data.runs.flatMap((r) => r.notes).join("\n");
  $("configs").replaceChildren(...data.runs.map((r) => make("div", {}, make("h2", {}, r.name), make("pre", { tabindex: "0" }, r.config || "(no config.yaml)"))));
  curves();
}
for (const b of document.querySelectorAll("[data-view]")) b.addEventListener("click", () => view(b.dataset.view));
for (const b of document.querySelectorAll("[data-by]")) b.addEventListener("click", () => {
  state.by = b.dataset.by;
  for (const o of document.querySelectorAll("[data-by]")) o.setAttribute("aria-pressed", String(o === b));
  group();
});
for (const id of ["smooth", "metric"]) $(id).addEventListener("input", curves);
for (const id of ["filter", "sort"]) $(id).addEventListener("change", credit);
$("search").addEventListener("input", credit);
$("step").addEventListener("change", () => to(+$("step").value));
$("run").addEventListener("change", () => { state.run = +$("run").value; state.newest = true; credit(); });
$("before").addEventListener("click", () => move(-1));
$("after").addEventListener("click", () => move(1));
$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
});
$("prompts").addEventListener("keydown", choose);
$("group").addEventListener("focusout", () => tip());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") tip();
  if (["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName) || event.ctrlKey || event.altKey || event.metaKey) return;
  if ($("credit").hidden) return;
  if (walk(event)) { event.preventDefault(); return; }
  if (event.key === "ArrowLeft") move(-1);
  if (event.key === "ArrowRight") move(1);
});
if (matchMedia("(prefers-color-scheme: dark)").matches) document.documentElement.dataset.theme = "dark";
all();
const asked = location.hash.replace("#view=", "");
view(["credit", "config"].includes(asked) ? asked : "curves");

// a live run: only what is new is sent; what is held stays, and what has the focus keeps it ----------
let before = "";
function news(sent) {
  const now = () => run()?.steps.find((s) => s.step === state.step);
  const old = now(), focused = document.activeElement, chart = [...document.querySelectorAll("#charts svg")].indexOf(focused);
  sent.runs.forEach((r, i) => {
    const held = data.runs[i];
    r.steps = r.steps.map((s) => s.groups ? s : held?.steps.find((h) => h.step === s.step)).filter(Boolean);
    for (const name of Object.keys(r.images)) r.images[name] ??= held?.images[name];
  });
  data = { ...data, ...sent };
  all();
  if (chart >= 0) document.querySelectorAll("#charts svg")[chart]?.focus();
  if ($("credit").hidden) return;
  const last = run().steps[run().steps.length - 1];
  if (now() !== old || (state.newest && last && last.step !== state.step)) {
    const listed = $("prompts").contains(focused);
    credit();
    if (listed) $("prompts").querySelector('[aria-selected="true"]')?.focus();
  } else $("step").replaceChildren(...run().steps.map((s) => make("option", { value: s.step, selected: s.step === state.step }, String(s.step))));
}
async function ask() {
  try {
    const answer = await fetch("/data.json?at=" + encodeURIComponent(data.at || "")), body = await answer.text();
    if (!answer.ok) { before = ""; $("notes").textContent = `${body.trim()} (asking again)`; } else if (body !== before) { before = body; news(JSON.parse(body)); }
  } catch (error) { before = ""; $("notes").textContent = `the server of this page does not answer; start it again with: reasonrl report RUN --serve (${error.message})`; }
  setTimeout(ask, data.every || 5000);
}
if (data.live) setTimeout(ask, data.every || 5000);
