"use strict";
// Light, dark, or as the system has it; remembered where the browser lets a file remember.
const $ = (id) => document.getElementById(id);
const make = (kind, name, text) => {
  const element = document.createElement(kind);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
};
const theme = {
  names: ["", "light", "dark"],
  changed: [],
  get now() { return document.documentElement.dataset.theme || ""; },
  set(name) {
    if (name) document.documentElement.dataset.theme = name; else delete document.documentElement.dataset.theme;
    try { localStorage.setItem("keel-theme", name); } catch { /* a file may not remember */ }
    const button = $("theme");
    if (button) button.textContent = { "": "Theme: system", light: "Theme: light", dark: "Theme: dark" }[name];
    theme.changed.forEach((tell) => tell());
  },
  next() { theme.set(theme.names[(theme.names.indexOf(theme.now) + 1) % 3]); },
  colour(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); },
  get dark() { return theme.now ? theme.now === "dark" : matchMedia("(prefers-color-scheme: dark)").matches; },
};
try { theme.set(localStorage.getItem("keel-theme") || ""); } catch { theme.set(""); }
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme.changed.forEach((tell) => tell()));
if ($("theme")) $("theme").addEventListener("click", () => theme.next());
