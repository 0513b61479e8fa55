"use strict";
// Search as you type, the slider, and the neighbours of the largest senses. Without this file every page works by links and buttons.
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

// Show a few neighbours beside each of the largest senses, one after the other; while their index is made, its progress.
const known = new Map();
async function neighbours(url) {
  const page = new DOMParser().parseFromString(await (await fetch(url)).text(), "text/html");
  const found = [...page.querySelectorAll("#neighbours li")].slice(0, 4).map((item) => [...item.querySelectorAll("a")]);
  const part = page.getElementById("indexed");
  return part ? part.value + " %" : found.flat();
}
async function nameSenses() {
  for (const token of document.querySelectorAll("section.token")) {
    for (const link of [...token.querySelectorAll("a.near")].slice(0, 8)) {
      const place = document.createElement("span");
      place.className = "named";
      link.after(place);
      let found = known.get(link.href);
      while (!found && link.isConnected) {
        const answer = await neighbours(link.href);
        if (typeof answer === "string") {
          place.textContent = ": their index is being made, " + answer;
          await new Promise((done) => setTimeout(done, 1000));
        } else known.set(link.href, found = answer);
      }
      place.textContent = found && found.length ? ": " : "";
      (found || []).forEach((a, i) => place.append(i ? "; " : "", a.cloneNode(true)));
    }
  }
}
nameSenses();

// Below the first words that two corpora use differently, an example from each.
(async () => {
  for (const row of [...document.querySelectorAll("tr.pair")].slice(0, 5)) {
    const url = row.previousElementSibling.querySelector("a").href;
    const page = new DOMParser().parseFromString(await (await fetch(url)).text(), "text/html");
    const found = [...page.querySelectorAll("#senses > section")].map((own) => own.querySelector(".example"));
    row.cells[0].append(...found.filter(Boolean));
    row.hidden = !row.cells[0].childElementCount;
  }
})();

const level = document.querySelector("form.level");
if (level) {
  const slider = level.elements.level;
  slider.addEventListener("input", () => { level.querySelector("output").value = slider.value + " %"; });
  slider.addEventListener("change", () => {
    const url = location.pathname + "?" + new URLSearchParams(new FormData(level));
    load(document.getElementById("senses"), url, (page) => page.getElementById("senses")).then(nameSenses);
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
