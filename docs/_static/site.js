// A box above the list of methods: a row stays while it holds every word typed.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.catalogue")) {
    const box = document.querySelector("input.filter");
    const rows = [...table.tBodies[0].rows];
    box.addEventListener("input", () => {
      const words = box.value.toLowerCase().split(/\s+/);
      for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    });
  }
});

// The atlas: a row stays while it has what the filters say and every word typed. The filters are in the address.
document.addEventListener("DOMContentLoaded", () => {
  const form = document.querySelector("form.atlas-filter");
  if (!form) return;
  const count = form.querySelector("output");
  const rows = [...document.querySelectorAll("table.atlas tbody tr")].map((row) => (
    { row, text: `${row.textContent} ${row.dataset.also}`.toLowerCase() }));
  const asked = () => Object.fromEntries([...new FormData(form)].filter(([, value]) => value.trim()));
  const show = () => {
    const { words = "", ...wanted } = asked();
    const typed = words.toLowerCase().split(/\s+/);
    let left = 0;
    for (const { row, text } of rows) {
      const keep = Object.entries(wanted).every(([name, value]) => row.dataset[name] === value)
        && typed.every((word) => text.includes(word));
      row.hidden = !keep;
      left += keep;
    }
    count.textContent = left === rows.length ? `${left} papers` : `${left} of ${rows.length} papers`;
  };
  const remember = () => {
    const query = new URLSearchParams(asked()).toString();
    try { history.replaceState(null, "", (query ? `?${query}` : location.pathname) + location.hash); } catch { /* file:// */ }
  };
  const open = () => {
    const row = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!row || !row.matches("table.atlas tr")) return;
    row.hidden = false;
    row.querySelector("details").open = true;
    row.scrollIntoView({ block: "center" });
  };
  for (const [name, value] of new URLSearchParams(location.search)) if (form.elements[name]) form.elements[name].value = value;
  form.addEventListener("input", () => { show(); remember(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", open);
  show();
  open();
});
