"use strict";

// Tables: a click on a head sorts; cells without a number stay at the end.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const sorter = document.createElement("button");
    sorter.type = "button";
    sorter.textContent = head.textContent;
    head.replaceChildren(sorter);
    sorter.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
      const numeric = head.classList.contains("n");
      const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
      rows.sort(([a], [b]) => {
        if (a === "" || b === "") return (a === "") - (b === "");
        return (down ? -1 : 1) * (numeric ? Number(a) - Number(b) : a.localeCompare(b));
      });
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  });
}

// The trajectory of a sample: a slider over its frames.
const player = document.getElementById("player");
if (player) {
  const paths = [...player.querySelectorAll(".path")];
  const [select, play, slider] = player.querySelectorAll("select, button, input");
  let frames = [];
  let timer = null;
  function show() {
    frames.forEach((frame, i) => { frame.hidden = i !== Number(slider.value); });
    const caption = frames[slider.value].querySelector(".caption").textContent;
    slider.setAttribute("aria-valuetext", caption);
  }
  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }
  function choose() {
    stop();
    paths.forEach((path, i) => { path.hidden = i !== Number(select.value); });
    frames = [...paths[select.value].querySelectorAll(".frame")];
    slider.max = frames.length - 1;
    slider.value = slider.max;
    show();
  }
  play.addEventListener("click", () => {
    if (timer !== null) { stop(); return; }
    if (slider.value === slider.max) slider.value = 0;
    show();
    play.textContent = "Pause";
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show();
      if (slider.value === slider.max) stop();
    }, Math.max(150, Math.min(900, 9000 / frames.length)));
  });
  slider.addEventListener("input", () => { stop(); show(); });
  select.addEventListener("change", choose);
  for (const path of paths) path.querySelector("h3").remove();
  player.querySelector(".controls").hidden = false;
  choose();
}
