const find = document.querySelector("#find"), sections = [...document.querySelectorAll("main > details")];
find.addEventListener("input", () => {
  const words = find.value.toLowerCase().split(/[\s,]+/).filter(Boolean);
  let count = 0;
  for (const section of sections) {
    const rows = [...section.querySelectorAll("tr.condition")];
    for (const row of rows) row.hidden = !words.every(word => row.cells[0].textContent.toLowerCase().includes(word));
    const shown = rows.filter(row => !row.hidden).length;
    count += shown;
    section.hidden = words.length > 0 && shown === 0;
    section.open = words.length > 0 && shown > 0;
  }
  document.querySelector("#found").textContent = words.length ? `${count} found` : "";
});
const reveal = () => {
  const aim = document.getElementById(location.hash.slice(1));
  if (aim && "open" in aim) aim.open = true;
};
addEventListener("hashchange", reveal);
addEventListener("beforeprint", () => sections.forEach(section => { section.open = true; }));
reveal();
