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
    local replies, sizes = redis.call('LRANGE', list, 0, -1), {}
    for r = 1, #replies do sizes[r] = #replies[r] end
    results[#results + 1] = {1,
      redis.call('HMGET', key, 'meta', 'epoch', 'revision', 'step', 'used', 'states'),
      table.concat(sizes, ' '), table.concat(replies)}  -- in one piece: to read many is what takes a client its time
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
  local epoch, before, revision, step, floor, start, changed, count, keep, used =
    string.match(ARGV[a], '^(%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d) (%d+) (%d+) (.+)$')
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
    if keep ~= '0' then redis.call('LTRIM', list, -keep, -1) end
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

# A tick, in columns: the first argument tells what all sessions have in common, the second has 24 bytes of each (epoch,
# revision before, step before), the third the states; then for each round the digests, the beginning of all answers and
# what follows in each. Only for numbers that Lua holds exactly. What does not follow what is stored is left alone.
TICK = Script(
    """
local used, keep, timesteps, width = string.match(ARGV[1], '^(%S+) (%d+) (%d+) (%d+)')
width, timesteps = tonumber(width), tonumber(timesteps)
local rounds, total = {}, 0
for steps, digest, rest in string.gmatch(ARGV[1], '|(%d+) (%d+) (%d+)') do
  rounds[#rounds + 1] = {tonumber(steps), tonumber(digest), tonumber(rest), string.format('%04d', tonumber(digest))}
  total = total + tonumber(steps)
end
local texts = {}
local function digits(number)  -- sessions that are stepped together are mostly at the same step
  local text = texts[number]
  if not text then
    text = string.format('%020.0f', number)
    texts[number] = text
  end
  return text
end
local results = {}
for k = 1, #KEYS, 2 do
  local key, list, at = KEYS[k], KEYS[k + 1], (k - 1) / 2
  local epoch, before, step = struct.unpack('<i8i8i8', ARGV[2], at * 24 + 1)
  local stored = redis.call('HMGET', key, 'epoch', 'revision', 'step')
  if stored[1] == string.format('%.0f', epoch) and stored[2] == string.format('%.0f', before)
      and stored[3] == digits(step) then
    redis.call('HSET', key, 'revision', string.format('%.0f', before + 1), 'step', digits(step + timesteps),
      'used', used, 'states', string.sub(ARGV[3], at * width + 1, (at + 1) * width))
    local first, replies = step + timesteps - total, {}
    for r, round in ipairs(rounds) do
      local digests, head, rest = ARGV[3 * r + 1], ARGV[3 * r + 2], ARGV[3 * r + 3]
      replies[r] = table.concat({digits(first), digits(first + round[1]), round[4],
        string.sub(digests, at * round[2] + 1, (at + 1) * round[2]), head,
        string.sub(rest, at * round[3] + 1, (at + 1) * round[3])})
      first = first + round[1]
    end
    if #replies > 0 then
      redis.call('RPUSH', list, unpack(replies))
      redis.call('LTRIM', list, -keep, -1)
    end
    results[#results + 1] = 1
  else
    results[#results + 1] = 0
  end
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
