"""What must hold at once in Redis: scripts, in Lua.

A script takes any number of sessions, the keys of each (the hash, the list of replies, the note of the end) and its
arguments, and answers with as many results. Numbers are compared as text, because Lua's hold 53 bits: steps are written
with 20 digits, and so sort as numbers do. A reply begins with the 20 digits of its first step and the 20 of its end.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Script:
    """A script and the name that Redis has for it."""

    text: str
    keys: int = 3

    @property
    def sha(self) -> str:
        """Its SHA-1, in hexadecimal."""
        return hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()


_ENDS = """
local function due(key, now)
  local at = redis.call('HMGET', key, 'used', 'idle', 'ends')
  if not at[1] then return nil end
  if tonumber(at[3]) <= now then return 'aged' end
  if tonumber(at[1]) + tonumber(at[2]) <= now then return 'idle' end
  return false
end
local function finish(key, list, note, why, now, remember)
  local kept = redis.call('HMGET', key, 'epoch', 'index')
  redis.call('DEL', key, list)
  redis.call('SET', note, why .. ' ' .. now .. ' ' .. kept[1], 'PX', remember)
  return kept[2]
end
"""

CREATE = Script(
    _ENDS
    + """
local results, a = {}, 2
for k = 1, #KEYS, 3 do
  local key, list, note = KEYS[k], KEYS[k + 1], KEYS[k + 2]
  local now, count = ARGV[a], tonumber(ARGV[a + 10])
  local why = due(key, tonumber(now))
  if why then finish(key, list, note, why, now, ARGV[1]) end
  if why == false then
    local stored = redis.call('HMGET', key, 'epoch', 'revision', 'index')
    if stored[1] == ARGV[a + 1] and stored[2] == ARGV[a + 2] then
      results[#results + 1] = {1}
    else
      results[#results + 1] = {0, stored[3]}
    end
  else
    redis.call('DEL', note)
    redis.call('HSET', key, 'epoch', ARGV[a + 1], 'revision', ARGV[a + 2], 'step', ARGV[a + 3], 'used', ARGV[a + 4],
      'idle', ARGV[a + 5], 'ends', ARGV[a + 6], 'index', ARGV[a + 7], 'meta', ARGV[a + 8], 'states', ARGV[a + 9])
    for r = 1, count do redis.call('RPUSH', list, ARGV[a + 10 + r]) end
    results[#results + 1] = {1}
  end
  a = a + 11 + count
end
return results
"""
)

TAKE = Script(
    _ENDS
    + """
local results = {}
for k = 1, #KEYS, 3 do
  local key, list, note = KEYS[k], KEYS[k + 1], KEYS[k + 2]
  local why = due(key, tonumber(ARGV[2]))
  if why then
    results[#results + 1] = {0, finish(key, list, note, why, ARGV[2], ARGV[1])}
  elseif why == nil then
    results[#results + 1] = {0}
  else
    redis.call('HINCRBY', key, 'epoch', 1)
    results[#results + 1] = {1,
      redis.call('HMGET', key, 'meta', 'epoch', 'revision', 'step', 'used', 'states'),
      redis.call('LRANGE', list, 0, -1)}
  end
end
return results
"""
)

COMMIT = Script(
    """
local results, a = {}, 1
for k = 1, #KEYS, 2 do
  local key, list = KEYS[k], KEYS[k + 1]
  local epoch, before, revision, step, floor, start, changed, count, used =
    string.match(ARGV[a], '^(%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d) (%d+) (.+)$')
  changed, count = changed == '1', tonumber(count)
  local stored = redis.call('HMGET', key, 'epoch', 'revision', 'step')
  local applied = 0
  if stored[1] == epoch and stored[2] == before then
    if changed then
      redis.call('HSET', key, 'revision', revision, 'step', step, 'used', used, 'states', ARGV[a + 1])
    else
      redis.call('HSET', key, 'revision', revision, 'step', step, 'used', used)
    end
    local first = tonumber(floor) > 0 and redis.call('LINDEX', list, 0)
    while first and string.sub(first, 1, 20) < floor do
      redis.call('LPOP', list)
      first = redis.call('LINDEX', list, 0)
    end
    local last = start < stored[3] and redis.call('LINDEX', list, -1)
    while last and string.sub(last, 21, 40) > start do
      redis.call('RPOP', list)
      last = redis.call('LINDEX', list, -1)
    end
    for r = 1, count do redis.call('RPUSH', list, ARGV[a + 1 + r]) end
    applied = 1
  elseif stored[1] == epoch and stored[2] == revision and stored[3] == step
      and (not changed or redis.call('HGET', key, 'states') == ARGV[a + 1]) then
    applied = 1
    for r = 1, count do
      if redis.call('LINDEX', list, r - 1 - count) ~= ARGV[a + 1 + r] then applied = 0 end
    end
  end
  results[#results + 1] = applied
  a = a + 2 + count
end
return table.concat(results)
""",
    keys=2,
)

DELETE = Script(
    _ENDS
    + """
local results = {}
for k = 1, #KEYS, 3 do
  local key, list, note = KEYS[k], KEYS[k + 1], KEYS[k + 2]
  local epoch, why, result = ARGV[4 + (k - 1) / 3], ARGV[2], {0}
  local stored = redis.call('HGET', key, 'epoch')
  if stored == epoch then
    result = {1, finish(key, list, note, why, ARGV[3], ARGV[1])}
  elseif not stored then
    local before, _, ended = string.match(redis.call('GET', note) or '', '^(%S+) (%S+) (%S+)$')
    if before == why and ended == epoch then result = {1} end
  end
  results[#results + 1] = result
end
return results
"""
)

EXPIRE = Script(
    _ENDS
    + """
local results = {}
for k = 1, #KEYS, 3 do
  local why = due(KEYS[k], tonumber(ARGV[2]))
  if why then
    results[#results + 1] = {1, finish(KEYS[k], KEYS[k + 1], KEYS[k + 2], why, ARGV[2], ARGV[1])}
  elseif why == nil then
    results[#results + 1] = {0}
  else
    results[#results + 1] = {2, redis.call('HMGET', KEYS[k], 'used', 'idle', 'ends', 'index')}
  end
end
return results
"""
)
