document.querySelectorAll("th").forEach(head => head.addEventListener("click", () => {
  const body = head.closest("table").tBodies[0], column = head.cellIndex, turn = head.dataset.turn = head.dataset.turn === "1" ? "-1" : "1";
  const value = row => { const text = row.cells[column].textContent, number = parseFloat(text.replace(/,/g, "")); return isNaN(number) ? text : number; };
  [...body.rows].sort((a, b) => { const x = value(a), y = value(b); return turn * (typeof x === typeof y ? (x > y) - (x < y) : typeof x === "number" ? -1 : 1); })
    .forEach(row => body.append(row));
}));
