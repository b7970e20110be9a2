// Before anything is drawn: the theme, and the font of formulas, so that nothing moves or changes colour later.
document.documentElement.dataset.theme ||= matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
const show = () => document.documentElement.classList.remove("waits");
document.fonts.load("1em formulas").finally(show);
document.documentElement.classList.add("waits");
setTimeout(show, 1000);  // whatever happens to the font
