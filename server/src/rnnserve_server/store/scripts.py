"""What must hold at once in Redis: scripts, in Lua.

A script takes any number of sessions, the keys of each (the hash, the list of replies, the note of the end) and its
arguments, and answers with as many results. Numbers are compared as text, because Lua's hold 53 bits: steps are written
with 20 digits, and so sort as numbers do. A reply begins with the 20 digits of its first step and the 20 of its end.

A tick is pushed to its writer's journal, whole. Of a session only the numbers are changed then, and that its states and
last replies lie in that journal; whoever wants these, or writes them another way, first has the journal folded: brought
to the sessions' own keys. So nobody else needs to know that there are journals. Another key counts the sessions that
have something in a journal, and with the last of them it goes.
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
  local kept = redis.call('HMGET', key, 'epoch', 'index', 'journal')
  redis.call('DEL', key, list)
  redis.call('SET', note, why .. ' ' .. now .. ' ' .. kept[1], 'PX', remember)
  if kept[3] and redis.call('DECR', kept[3] .. ':sessions') == 0 then
    redis.call('DEL', kept[3], kept[3] .. ':sessions')
  end
  return kept[2]
end
"""

# The entries of a journal are, for each tick, its parts as `TICK` has them and then its keys. It is read from its end,
# until all that is wanted is found: the last states and the last replies of each session. A session that has ended
# since, or was made anew, has another epoch or no journal.
_FOLD = """
local function texts()  -- sessions that are stepped together are mostly at the same step
  local known = {}
  return function(number)
    local text = known[number]
    if not text then
      text = string.format('%020.0f', number)
      known[number] = text
    end
    return text
  end
end
local function push(list, values)  -- of which a call takes some thousands
  for start = 1, #values, 1000 do
    redis.call('RPUSH', list, unpack(values, start, math.min(start + 999, #values)))
  end
end
local function fold(journal)
  local left, digits = tonumber(redis.call('GET', journal .. ':sessions')), texts()
  local found, last = {}, -1
  while left > 0 do
    local keys, common = redis.call('LINDEX', journal, last), redis.call('LINDEX', journal, last - 1)
    local keep, timesteps, width = string.match(common, '^%S+ (%d+) (%d+) (%d+)')
    local rounds = {}
    for steps, digest, rest in string.gmatch(common, '|(%d+) (%d+) (%d+)') do
      rounds[#rounds + 1] = {tonumber(steps), tonumber(digest), tonumber(rest), string.format('%04d', tonumber(digest))}
    end
    local columns = redis.call('LINDEX', journal, last - 2)
    local states, answers
    keep, timesteps, width, last = tonumber(keep), tonumber(timesteps), tonumber(width), last - 3
    local at = 0
    for key in string.gmatch(keys, '[^\\n]+') do
      local session, epoch, _, step = found[key], struct.unpack('<i8i8i8', columns, at * 24 + 1)
      if session == nil then
        local stored = redis.call('HMGET', key, 'epoch', 'journal')
        session = stored[2] == journal and tonumber(stored[1]) == epoch and {epoch = epoch, keep = keep}
        if session then
          states = states or redis.call('LINDEX', journal, last)
          redis.call('HSET', key, 'states', string.sub(states, at * width + 1, (at + 1) * width))
          redis.call('HDEL', key, 'journal')
        end
        found[key] = session
      end
      if session and session.epoch == epoch then
        local first = step + timesteps
        for r = #rounds, 1, -1 do
          local round = rounds[r]
          if #session >= session.keep then break end
          answers = answers or redis.call('LRANGE', journal, last - 3 * #rounds, last - 1)
          local digests, head, rest = answers[3 * r - 2], answers[3 * r - 1], answers[3 * r]
          first = first - round[1]
          session[#session + 1] = table.concat({digits(first), digits(first + round[1]), round[4],
            string.sub(digests, at * round[2] + 1, (at + 1) * round[2]), head,
            string.sub(rest, at * round[3] + 1, (at + 1) * round[3])})
        end
        if #session >= session.keep and not session.whole then
          session.whole = true
          left = left - 1
        end
      end
      at = at + 1
    end
    last = last - 1 - 3 * #rounds
    if redis.call('LLEN', journal) < -last then break end
  end
  redis.call('DEL', journal, journal .. ':sessions')
  for key, session in pairs(found) do
    if session and #session > 0 then
      local list, replies = key .. ':replies', {}
      for r = #session, 1, -1 do replies[#replies + 1] = session[r] end
      push(list, replies)
      redis.call('LTRIM', list, -session.keep, -1)
    end
  end
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
    + _FOLD
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
    local journal = redis.call('HGET', key, 'journal')
    if journal then fold(journal) end
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
    _FOLD
    + """
local results, a = {}, 1
for k = 1, #KEYS, 2 do
  local key, list = KEYS[k], KEYS[k + 1]
  local epoch, before, revision, step, floor, start, changed, count, keep, used =
    string.match(ARGV[a], '^(%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d) (%d+) (%d+) (.+)$')
  changed, count = changed == '1', tonumber(count)
  local stored = redis.call('HMGET', key, 'epoch', 'revision', 'step', 'journal')
  local applied = 0
  if stored[4] then fold(stored[4]) end
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

# A tick, in columns. Keys: the sessions' hashes, and the journal. Arguments: for each of its rounds the digests, the
# beginning of all answers and what follows in each; the states; 24 bytes of each session (epoch, revision before, step
# before); what all sessions have in common; and whether to fold the journal then. Only for numbers that Lua holds
# exactly. Applied as a whole or, if a session does not follow what is stored, not at all.
TICK = Script(
    _FOLD
    + """
local common, columns, journal, sessions, fresh = ARGV[#ARGV - 1], ARGV[#ARGV - 2], KEYS[#KEYS], #KEYS - 1, {}
local used, timesteps = string.match(common, '^(%S+) %d+ (%d+)')
local befores, steps, digits = {}, {}, texts()
timesteps = tonumber(timesteps)
for k = 1, sessions do
  local epoch, before, step = struct.unpack('<i8i8i8', columns, (k - 1) * 24 + 1)
  local stored = redis.call('HMGET', KEYS[k], 'epoch', 'revision', 'step', 'journal')
  if tonumber(stored[1]) ~= epoch or tonumber(stored[2]) ~= before or tonumber(stored[3]) ~= step then return 0 end
  if not stored[4] then
    fresh[#fresh + 1] = KEYS[k]
  elseif stored[4] ~= journal then
    return 0
  end
  befores[k], steps[k] = before, step
end
for k = 1, sessions do
  redis.call('HSET', KEYS[k], 'revision', string.format('%.0f', befores[k] + 1), 'step', digits(steps[k] + timesteps),
    'used', used)
end
for _, key in ipairs(fresh) do redis.call('HSET', key, 'journal', journal) end
if #fresh > 0 then redis.call('INCRBY', journal .. ':sessions', #fresh) end
local parts = {}
for a = 1, #ARGV - 1 do parts[a] = ARGV[a] end
parts[#parts + 1] = table.concat(KEYS, '\\n', 1, sessions)
push(journal, parts)
if ARGV[#ARGV] == '1' then fold(journal) end
return 1
"""
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
