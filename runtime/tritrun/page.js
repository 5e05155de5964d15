// All that this does can be done without: order the table by a column, and light up a row together with its points.
for (const head of document.querySelectorAll("thead [data-column]")) {
  const button = document.createElement("button");
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const up = head.ariaSort !== "ascending", body = document.querySelector("tbody.files");
    for (const other of document.querySelectorAll("thead [aria-sort]")) other.removeAttribute("aria-sort");
    head.ariaSort = up ? "ascending" : "descending";
    const value = row => row.cells[head.dataset.column].dataset.value;
    const order = (a, b) => a === b ? 0 : a === "" ? 1 : b === "" ? -1 : (a - b || a.localeCompare(b)) * (up ? 1 : -1);
    body.append(...[...body.rows].sort((a, b) => order(value(a), value(b))));
  });
}
for (const point of document.querySelectorAll("a.point")) {
  const row = document.querySelector(point.getAttribute("href"));
  for (const [from, to] of [[point, row], [row, point]]) {
    from.addEventListener("pointerenter", () => to.classList.add("lit"));
    from.addEventListener("pointerleave", () => to.classList.remove("lit"));
  }
}
