// Requests to the gateway, with the key that was typed in, if one was.
class Refused extends Error {}

export const refused = (error) => error instanceof Refused;

export async function read(path) {
  const key = sessionStorage.getItem("key");
  const response = await fetch(path, { headers: key ? { authorization: `Bearer ${key}` } : {} });
  if (response.status === 401) throw new Refused();
  if (!response.ok) throw new Error((await response.json()).error);
  return response;
}
