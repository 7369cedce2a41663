// What the page gains by a script; without one it can be read all the same.
// Tables: a click on a column's head orders the rows by it.
for (const table of document.querySelectorAll(".scroll table")) {
  const body = table.tBodies[0];
  const merged = [...body.rows].some(row => !row.cells[0].textContent.trim());  // a group's name stands in its first row
  if (merged || body.rows.length < 3) continue;
  const key = (row, column) => {
    const text = (row.cells[column]?.firstChild?.textContent ?? "").trim();
    const number = parseFloat(text.replace(/\u2212/g, "-").replace(/[,\s]/g, ""));
    return [Number.isNaN(number) ? -Infinity : number, text];
  };
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.className = "order";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].map(row => [key(row, column), row]);
      rows.sort(([a], [b]) => b[0] - a[0] || a[1].localeCompare(b[1]));
      body.append(...(down ? rows : rows.reverse()).map(([, row]) => row));
    });
  });
}
// Folded details: a link to one opens it, with all around it.
const open = () => {
  const place = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!place) return;
  for (let at = place; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  place.scrollIntoView();
};
addEventListener("hashchange", open);
open();
// Contents: the section in view is marked.
const links = new Map([...document.querySelectorAll("nav a")].map(link => [link.hash.slice(1), link]));
const mark = new IntersectionObserver(entries => {
  for (const entry of entries) if (entry.isIntersecting) {
    for (const link of links.values()) link.classList.remove("here");
    links.get(entry.target.id)?.classList.add("here");
  }
}, { rootMargin: "0px 0px -70% 0px" });
for (const section of document.querySelectorAll("section[id]")) mark.observe(section);
