"""What must hold at once in Redis: scripts, in Lua.

A script takes any number of sessions, the keys of each (the hash, the list of replies, the note of the end) and its
arguments, and answers with as many results. Numbers are compared as text, because Lua's hold 53 bits: steps are written
with 20 digits, and so sort as numbers do. A reply begins with the 20 digits of its first step and the 20 of its end.

A tick is pushed to its writer's journal, whole. Of a session that has something in a journal, the hash says so and in
whose. Its numbers, states and last replies are what the journal says; what the hash has of them is of the past, and the
time of the last use is empty there, so that releases that do not know of this fail rather than believe the rest. To
read any of these but for a look, or to change them, is to fold the journal first: to bring it to the sessions' own keys
and remove it. So as long as a journal is there, nobody but its writer has touched its sessions, and the writer may push
their next tick without asking: by RPUSHX, which does nothing where there is no list. Hence:

* What is folded never comes back: no two journals have the same name.
* A push that may have been lost is not sent again, and nothing is pushed behind it. What it was is written to the
  sessions themselves, whereby the journal is folded, with the push or without it, which then comes too late.
* When a writer ends a session of its own, nothing is folded: what is pushed of it after that is of an epoch that is
  over. Another key counts the sessions that have something in a journal, and with the last of them it goes.
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


# The elements of a journal are, for each tick, its parts as `TICK` has them. It is read from its end, until all that is
# wanted is found. A session that has ended since, or was made anew, has another epoch or no journal. Until format 3
# there were blanks where there are commas, and one reply of each session in each part; scripts that know only of that
# find no numbers, and fail before they have written anything.
_JOURNAL = """
local function tick_at(journal, last)  -- the tick whose last element is there
  local found, answered = redis.call('LRANGE', journal, last - 2, last), {}
  local used, keep, timesteps, width = string.match(found[2], '^([^ ,]+)[ ,](%d+)[ ,](%d+)[ ,](%d+)')
  for steps, digest, rest, replies in string.gmatch(found[2], '|(%d+)[ ,](%d+)[ ,](%d+),?(%d*)') do
    answered[#answered + 1] = {steps = tonumber(steps), digest = tonumber(digest), rest = tonumber(rest),
      replies = tonumber(replies) or 1, digits = string.format('%04d', tonumber(digest))}
  end
  return {columns = found[1], keys = found[3], used = used, keep = tonumber(keep), timesteps = tonumber(timesteps),
    width = tonumber(width), answered = answered, states = last - 3, before = last - 4 - 3 * #answered}
end
"""

_FOLD = (
    _JOURNAL
    + """
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
local function push(list, values, first)  -- of which a call takes some thousands
  for start = first, #values, 1000 do
    redis.call('RPUSH', list, unpack(values, start, math.min(start + 999, #values)))
  end
end
local function fold(journal)
  -- Releases before format 2 counted the sessions in another key, and had their numbers in the hashes too.
  local left = tonumber(redis.call('GET', journal .. ':open') or redis.call('GET', journal .. ':sessions'))
  local found, last, first, digits = {}, -1, -redis.call('LLEN', journal), texts()
  while left > 0 and last >= first do
    local tick = tick_at(journal, last)
    local count, states, answers = #tick.columns / 24, nil, nil
    local at = 0
    for key in string.gmatch(tick.keys, '[^\\n]+') do
      local session, epoch, before, step = found[key], struct.unpack('<i8i8i8', tick.columns, at * 24 + 1)
      if not session then
        local stored = redis.call('HMGET', key, 'epoch', 'journal')
        if stored[2] == journal and tonumber(stored[1]) == epoch then
          session = {epoch = epoch, keep = tick.keep}
          found[key] = session
          states = states or redis.call('LINDEX', journal, tick.states)
          redis.call('HSET', key, 'revision', string.format('%.0f', before + 1), 'step', digits(step + tick.timesteps),
            'used', tick.used, 'states', string.sub(states, at * tick.width + 1, (at + 1) * tick.width))
          redis.call('HDEL', key, 'journal')
        end
      end
      if session and session.epoch == epoch then
        local start = step + tick.timesteps
        for p = #tick.answered, 1, -1 do
          local part = tick.answered[p]
          for r = part.replies - 1, 0, -1 do
            if #session >= session.keep then break end
            answers = answers or redis.call('LRANGE', journal, tick.before + 1, tick.states - 1)
            local row, digest, rest = r * count + at, part.digest, part.rest
            start = start - part.steps
            session[#session + 1] = table.concat({digits(start), digits(start + part.steps), part.digits,
              string.sub(answers[3 * p - 2], row * digest + 1, (row + 1) * digest), answers[3 * p - 1],
              string.sub(answers[3 * p], row * rest + 1, (row + 1) * rest)})
          end
        end
        if #session >= session.keep and not session.whole then
          session.whole = true
          left = left - 1
        end
      end
      at = at + 1
    end
    last = tick.before
  end
  redis.call('DEL', journal, journal .. ':open', journal .. ':sessions')
  for key, session in pairs(found) do
    if #session > 0 then
      local list, replies = key .. ':replies', {}
      for r = #session, 1, -1 do replies[#replies + 1] = session[r] end
      push(list, replies, 1)
      redis.call('LTRIM', list, -session.keep, -1)
    end
  end
end
"""
)

_ENDS = (
    _FOLD
    + """
local function due(key, now)
  local at = redis.call('HMGET', key, 'used', 'idle', 'ends', 'journal')
  if not at[1] then return nil end
  if at[4] then
    fold(at[4])
    at[1] = redis.call('HGET', key, 'used')
  end
  if tonumber(at[3]) <= now then return 'aged' end
  if tonumber(at[1]) + tonumber(at[2]) <= now then return 'idle' end
  return false
end
local function finish(key, list, note, why, now, remember)
  local kept = redis.call('HMGET', key, 'epoch', 'index', 'journal')
  redis.call('DEL', key, list)
  redis.call('SET', note, why .. ' ' .. now .. ' ' .. kept[1], 'PX', remember)
  if kept[3] and redis.call('DECR', kept[3] .. ':open') == 0 then
    redis.call('DEL', kept[3], kept[3] .. ':open')
  end
  return kept[2]
end
"""
)

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
    _FOLD
    + """
local results, a = {}, 1
for k = 1, #KEYS, 2 do
  local key, list = KEYS[k], KEYS[k + 1]
  local epoch, before, revision, step, floor, start, changed, count, keep, used =
    string.match(ARGV[a], '^(%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d) (%d+) (%d+) (.+)$')
  changed, count = changed == '1', tonumber(count)
  local journal = redis.call('HGET', key, 'journal')
  if journal then fold(journal) end
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

# A tick of sessions some of which are not in the journal yet. Keys: the hashes of those, and the journal. Arguments: 24
# bytes of each of those (epoch, revision before, step before); how many elements the journal has, none if it is still
# to be made; a journal to be folded first, or nothing; and the tick, as the elements that are pushed: for each part of
# its answers, which has one or more of each session, the digests, the beginning of all answers and what follows in
# each; the states; 24 bytes of each session; what all sessions have in common; and the keys of the sessions, one a
# line. Only for numbers that Lua holds exactly.
# Answers with the elements that the journal has then, or 0 if anything is not as the writer thinks, and nothing of the
# tick was applied.
TICK = Script(
    _FOLD
    + """
local journal, fresh, columns, before = KEYS[#KEYS], #KEYS - 1, ARGV[1], ARGV[3]
if before ~= '' and redis.call('EXISTS', before) == 1 then fold(before) end
if redis.call('LLEN', journal) ~= tonumber(ARGV[2]) then return 0 end
for k = 1, fresh do
  local epoch, revision, step = struct.unpack('<i8i8i8', columns, (k - 1) * 24 + 1)
  local stored = redis.call('HMGET', KEYS[k], 'epoch', 'revision', 'step', 'journal')
  if stored[4] or tonumber(stored[1]) ~= epoch or tonumber(stored[2]) ~= revision or tonumber(stored[3]) ~= step then
    return 0
  end
end
for k = 1, fresh do redis.call('HSET', KEYS[k], 'journal', journal, 'used', '') end
if fresh > 0 then redis.call('INCRBY', journal .. ':open', fresh) end
push(journal, ARGV, 4)
return redis.call('LLEN', journal)
"""
)

# Takes ticks out of a journal, wherever they are: those of sessions that rest must not keep all that comes after them.
# Key: the journal. Arguments: how many elements it has; a text that none of them is; and of each tick where its first
# and its last element are. Answers with the elements that it has then, or 0 if it is not as the writer thinks, and
# nothing was taken out.
TRIM = Script(
    """
local journal = KEYS[1]
if redis.call('LLEN', journal) ~= tonumber(ARGV[1]) then return 0 end
for a = 3, #ARGV, 2 do
  for at = tonumber(ARGV[a]), tonumber(ARGV[a + 1]) do redis.call('LSET', journal, at, ARGV[2]) end
end
redis.call('LREM', journal, 0, ARGV[2])
return redis.call('LLEN', journal)
""",
    keys=1,
)

# Of each session: description, epoch, revision, step and time of the last use, the last three out of its journal if it
# is in one.
PEEK = Script(
    _JOURNAL
    + """
local heads, wanted = {}, {}
for k = 1, #KEYS do
  local head = redis.call('HMGET', KEYS[k], 'meta', 'epoch', 'revision', 'step', 'used', 'journal')
  heads[k] = head
  if head[6] then
    local some = wanted[head[6]] or {left = 0, heads = {}}
    wanted[head[6]], some.left, some.heads[KEYS[k]] = some, some.left + 1, head
  end
end
for journal, some in pairs(wanted) do
  local last, first = -1, -redis.call('LLEN', journal)
  while some.left > 0 and last >= first do
    local tick, at = tick_at(journal, last), 0
    for key in string.gmatch(tick.keys, '[^\\n]+') do
      local head = some.heads[key]
      local epoch, before, step = struct.unpack('<i8i8i8', tick.columns, at * 24 + 1)
      if head and tonumber(head[2]) == epoch then
        head[3], head[4], head[5] = before + 1, step + tick.timesteps, tick.used
        some.heads[key], some.left = nil, some.left - 1
      end
      at = at + 1
    end
    last = tick.before
  end
end
return heads
""",
    keys=1,
)

DELETE = Script(
    _ENDS
    + """
local results = {}
for k = 1, #KEYS, 3 do
  local key, list, note = KEYS[k], KEYS[k + 1], KEYS[k + 2]
  local epoch, why, result = ARGV[5 + (k - 1) / 3], ARGV[2], {0}
  local stored, journal = unpack(redis.call('HMGET', key, 'epoch', 'journal'))
  if stored == epoch then
    if journal and journal ~= ARGV[4] then fold(journal) end  -- its writer does not know
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
