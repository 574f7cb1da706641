"use strict";
// The run page: curves, and how a step's reward became credit. Text is only ever set as text.
const $ = (id) => document.getElementById(id);
let data = JSON.parse($("data").textContent);
const COLOURS = ["#1f77d0", "#d9731a", "#2a9d5c", "#b5459b", "#7a6ff0", "#a0522d"];
const state = { run: 0, step: null, prompt: null, by: "reward", newest: true };

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
const mean = (v) => v.length ? v.reduce((a, b) => a + b, 0) / v.length : null;
const least = (v) => v.reduce((a, b) => Math.min(a, b), Infinity);
const most = (v) => v.reduce((a, b) => Math.max(a, b), -Infinity);

function tip(x, y, text) {
  const box = $("tip");
  box.hidden = !text;
  if (!text) return;
  box.textContent = text;
  const left = Math.max(4, Math.min(x + 14, innerWidth - box.offsetWidth - 8));
  const top = y + 18 + box.offsetHeight > innerHeight ? Math.max(4, y - box.offsetHeight - 10) : y + 18;
  box.style.left = `${left}px`; box.style.top = `${top}px`;
}
function grow(parent, items, make, at) {
  // Children for the first `at` items; the rest follow in portions when their place comes near.
  let done = 0;
  const mark = make1("more");
  function more(n) {
    const part = items.slice(done, done + n).map(make);
    done += part.length;
    mark.before(...part);
    if (done >= items.length) { watch.disconnect(); mark.remove(); }
  }
  const watch = new IntersectionObserver((seen) => { if (seen.some((s) => s.isIntersecting)) { more(at); again(); } }, { rootMargin: "600px" });
  const again = () => { if (mark.isConnected) { watch.unobserve(mark); watch.observe(mark); } };
  parent.replaceChildren(mark);
  more(at);
  again();
  return more;
}
const make1 = (name) => make("span", { class: name, "aria-hidden": "true" });

