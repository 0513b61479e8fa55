"use strict";
// Search as you type, and the slider. Without this file every page works by links and buttons.
document.documentElement.classList.add("script");

// Replace the content of a place by that of the same place in a page; a later request overtakes an earlier one.
const latest = new Map();
async function load(place, url, select) {
  const number = (latest.get(place) || 0) + 1;
  latest.set(place, number);
  const response = await fetch(url);
  const page = new DOMParser().parseFromString(await response.text(), "text/html");
  const found = select(page);
  if (found && latest.get(place) === number) place.replaceChildren(...found.childNodes);
}

const field = document.getElementById("q");
const hits = document.getElementById("hits");
field.addEventListener("input", () => {
  if (field.value.trim()) load(hits, "/search?q=" + encodeURIComponent(field.value), (page) => page.body);
  else { latest.set(hits, (latest.get(hits) || 0) + 1); hits.replaceChildren(); }
});
document.querySelector(".search").addEventListener("keydown", (event) => {
  const links = [...hits.querySelectorAll("a")];
  const at = links.indexOf(document.activeElement);
  if (event.key === "Escape") { hits.replaceChildren(); field.focus(); }
  else if (event.key === "ArrowDown" && links.length) { links[(at + 1) % links.length].focus(); event.preventDefault(); }
  else if (event.key === "ArrowUp" && at >= 0) { (links[at - 1] || field).focus(); event.preventDefault(); }
});

const level = document.querySelector("form.level");
if (level) {
  const slider = level.elements.level;
  slider.addEventListener("input", () => { level.querySelector("output").value = slider.value + " %"; });
  slider.addEventListener("change", () => {
    const url = location.pathname + "?" + new URLSearchParams(new FormData(level));
    load(document.getElementById("senses"), url, (page) => page.getElementById("senses"));
    history.replaceState(null, "", url);
  });
}

// A click on a token shows its senses, and in the other sentence those of the same token.
for (const link of document.querySelectorAll(".spans a")) {
  link.addEventListener("click", (event) => {
    const own = document.getElementById(link.hash.slice(1));
    for (const choices of document.querySelectorAll(".choices")) {
      const here = choices.closest(".read") === own.closest(".read");
      choices.classList.toggle("shown", here ? choices === own : choices.dataset.token === own.dataset.token);
    }
    own.focus();
    event.preventDefault();
  });
}
