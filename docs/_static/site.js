// A box above the list of methods: a row stays while it holds every word typed.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.catalogue")) {
    const box = document.createElement("input");
    Object.assign(box, { type: "search", className: "filter", placeholder: "Filter: a name, a signal, a word of a title" });
    box.setAttribute("aria-label", "Filter the methods");
    const rows = [...table.tBodies[0].rows];
    box.addEventListener("input", () => {
      const words = box.value.toLowerCase().split(/\s+/);
      for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    });
    (table.closest(".pst-scrollable-table-container") ?? table).before(box);
  }
});
