"use strict";
// What openapi.json says, as a page.
const make = (tag, text, ...inner) => {
  const found = document.createElement(tag);
  if (text) found.textContent = text;
  found.append(...inner);
  return found;
};

const kind = (field) => {
  if (field.$ref) return field.$ref.split("/").pop();
  if (field.anyOf) return field.anyOf.filter((one) => one.type !== "null").map(kind).join(" or ");
  if (field.enum) return field.enum.map((one) => JSON.stringify(one)).join(" or ");
  if (field.type === "array") return `list of ${kind(field.items || {})}`;
  return field.type || "any";
};

function table(schema) {
  const rows = Object.entries(schema.properties || {}).map(([name, field]) => {
    const needed = (schema.required || []).includes(name) ? "needed" : "";
    return make("tr", "", make("td", name), make("td", kind(field)), make("td", needed));
  });
  return make("table", "", make("tbody", "", ...rows));
}

fetch("/openapi.json").then((answer) => answer.json()).then((api) => {
  const parts = Object.entries(api.paths).flatMap(([path, methods]) =>
    Object.entries(methods).flatMap(([method, about]) => {
      const body = about.requestBody?.content["application/json"].schema.$ref;
      const schema = body && api.components.schemas[body.split("/").pop()];
      return [
        make("h2", `${method.toUpperCase()} ${path}`), make("p", about.summary),
        ...(schema ? [make("p", schema.description), table(schema)] : []),
      ];
    }));
  document.getElementById("paths").replaceChildren(...parts);
});
