for (const button of document.querySelectorAll(".sortable button")) button.onclick = () => {
  const head = button.closest("th"), table = head.closest("table"), index = head.cellIndex, body = table.tBodies[0];
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = row => row.cells[index].dataset.value ?? row.cells[index].textContent;
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)], [p, q] = [parseFloat(x), parseFloat(y)];
    if (isNaN(p) && isNaN(q)) return x.localeCompare(y) * (down ? -1 : 1);
    if (isNaN(p) || isNaN(q)) return isNaN(p) - isNaN(q);  // rows without a value stay below
    return (p - q) * (down ? -1 : 1);
  });
  body.append(...rows);
};
const family = document.getElementById("family");
if (family) family.onchange = () => {
  for (const table of document.querySelectorAll(".family")) table.hidden = table.dataset.family !== family.value;
};
const wall = document.querySelector(".wall");
if (wall) {
  const prompt = document.getElementById("prompt"), play = document.getElementById("play");
  const tiles = JSON.parse(document.getElementById("tiles").textContent), images = wall.querySelectorAll("img");
  images.forEach((image, i) => tiles[i].unshift(image.src));
  prompt.onchange = () => images.forEach((image, i) => { image.src = tiles[i][prompt.value]; });
  let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  const show = () => { play.textContent = playing ? "Pause" : "Play"; wall.classList.toggle("paused", !playing); };
  play.onclick = () => { playing = !playing; wall.classList.add("asked"); show(); };
  show();
}
