// Theme, and search over the sections of all pages; the sections come from search-index.js.
"use strict";

const root = document.documentElement;
const button = document.getElementById("theme");
const dark = matchMedia("(prefers-color-scheme: dark)");
const chosen = () => root.dataset.theme || (dark.matches ? "dark" : "light");

try { root.dataset.theme = localStorage.getItem("theme") || ""; } catch { root.dataset.theme = ""; }
button.addEventListener("click", () => {
  root.dataset.theme = chosen() === "dark" ? "light" : "dark";
  try { localStorage.setItem("theme", root.dataset.theme); } catch { /* a file:// page may have no storage */ }
});

const input = document.getElementById("query");
const results = document.getElementById("results");
const LIMIT = 40;

function excerpt(text, words) {
  const at = Math.max(0, text.toLowerCase().indexOf(words[0]) - 60);
  return (at > 0 ? "… " : "") + text.slice(at, at + 220) + (at + 220 < text.length ? " …" : "");
}

function marked(text, words) {
  const escaped = words.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  return text.split(new RegExp(`(${escaped.join("|")})`, "i")).map((part, i) => {
    const node = document.createElement(i % 2 ? "mark" : "span");
    node.textContent = part;
    return node;
  });
}

function search(query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  results.replaceChildren();
  results.hidden = words.length === 0;
  if (results.hidden) return;
  const found = SECTIONS.map((section) => {
    const title = section.title.toLowerCase();
    const text = `${title} ${section.text.toLowerCase()}`;
    const all = words.every((word) => text.includes(word));
    const inTitle = words.filter((word) => title.includes(word)).length;
    return { section, score: all ? 1 + 5 * inTitle : 0 };
  }).filter((each) => each.score > 0).sort((a, b) => b.score - a.score);
  const heading = document.createElement("p");
  heading.className = "count";
  heading.textContent = found.length === 0 ? `Nothing has “${query}” in it.`
    : `${found.length} ${found.length === 1 ? "place" : "places"} with “${query}”`;
  results.append(heading);
  for (const { section } of found.slice(0, LIMIT)) {
    const link = document.createElement("a");
    link.href = section.link;
    link.append(...marked(section.title, words));
    const where = document.createElement("small");
    where.textContent = section.page;
    const text = document.createElement("p");
    text.append(...marked(excerpt(section.text, words), words));
    const item = document.createElement("div");
    item.className = "hit";
    item.append(link, " ", where, text);
    results.append(item);
  }
}

input.addEventListener("input", () => search(input.value));
input.form.addEventListener("submit", (event) => { event.preventDefault(); search(input.value); });
results.addEventListener("click", (event) => { if (event.target.closest("a")) { input.value = ""; search(""); } });
const asked = new URLSearchParams(location.search).get("q");
if (asked) { input.value = asked; search(asked); }
