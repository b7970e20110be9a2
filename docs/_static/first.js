// Before anything is drawn: the theme, and the font of formulas, so that nothing moves or changes colour later.
document.documentElement.dataset.theme ||= matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
document.documentElement.classList.add("waits");
document.fonts.load("1em formulas").finally(() => document.documentElement.classList.remove("waits"));
