"""Lua scripts that change a job in Redis; each runs as a whole or not at all.

In: the keys of one job (`KEYS`, in `keys_of`'s order) and arguments. Out: script texts for `store.py`.
A shard is always in exactly one of `waiting`, `leases` and `done`, so a task that runs twice, or late, changes nothing.
"""

from collections.abc import Callable

from worker import keys
from worker.states import MOVES, TERMINAL


def keys_of(job_id: str) -> list[str]:
    """Keys that scripts find in `KEYS`; the last two are prefixes of keys, which Redis Cluster would refuse."""
    per_job = (
        keys.job, keys.waiting, keys.leases, keys.owners, keys.fractions, keys.attempts, keys.done, keys.refusals
    )  # fmt: skip
    shared = [keys.JOBS, keys.FINISHED, keys.SEQUENCE, keys.TURNS, keys.REFUSED, keys.WORKERS, keys.TOMBSTONES]
    results = [keys.result(job_id), keys.table(job_id)]
    return [key(job_id) for key in per_job] + results + shared + [keys.partial(job_id, ""), keys.in_state("")]


_NAMES = (
    "job waiting leases owners fractions attempts done refusals result tbl jobs finished sequence turns refused"
    " workers tombstones partial_of in_state"
)


def _lua_set(names: list[str]) -> str:
    return "{" + ", ".join(f"{name} = true" for name in sorted(names)) + "}"


_MOVES = ", ".join(f"{origin} = {_lua_set(list(targets))}" for origin, targets in MOVES.items())

_PREAMBLE = (
    f"""
local {", ".join(_NAMES.split())} = unpack(KEYS)
local MOVES = {{{_MOVES}}}
local TERMINAL = {_lua_set(list(TERMINAL))}
local FINALIZE = '{keys.FINALIZE}'
local PLAN = '{keys.PLAN}'
"""
    + """
local id = ARGV[1]
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1e6
local status = redis.call('HGET', job, 'status') or 'unknown'

local function drop_work()
  for _, shard in ipairs(redis.call('SMEMBERS', done)) do redis.call('UNLINK', partial_of .. shard) end
  redis.call('UNLINK', waiting, leases, owners, fractions, attempts, done)
end

-- The shards, from the `first` on, wait in this order; their job joins the queue for turns.
local function wait(shards, first)
  for i = first or 1, #shards do redis.call('ZADD', waiting, now + i * 1e-6, shards[i]) end
  if status ~= 'finalizing' then redis.call('ZADD', turns, 'NX', now, id) end
end

-- A shard that its worker left goes first, as if it had waited the longest. So does its job.
local function wait_first(shard)
  local function before(line)
    return math.min(now, tonumber(redis.call('ZRANGE', line, 0, 0, 'WITHSCORES')[2]) or now) - 1e-6
  end
  redis.call('ZADD', waiting, before(waiting), shard)
  if status == 'finalizing' then return end
  redis.call('ZADD', turns, before(turns), id)
  redis.call('HDEL', job, 'turn_began')
end

-- A shard that has failed before goes last, and so does its job: others go first between its attempts.
local function wait_last(shard)
  redis.call('ZADD', waiting, now, shard)
  if status == 'finalizing' then return end
  redis.call('ZADD', turns, now, id)
  redis.call('HDEL', job, 'turn_began')
end

local function move(to)
  if not (MOVES[status] and MOVES[status][to]) then return false end
  redis.call('ZREM', in_state .. status, id)
  redis.call('ZADD', in_state .. to, redis.call('HGET', job, 'seq'), id)
  redis.call('HSET', job, 'status', to)
  status = to
  if to ~= 'running' then redis.call('ZREM', turns, id) end
  if TERMINAL[to] then
    redis.call('ZADD', finished, now, id)
    if to ~= 'expired' then
      redis.call('HSET', job, 'finished_at', now, 'n_done', redis.call('SCARD', done))
    end
    drop_work()
    redis.call('UNLINK', refusals)
    redis.call('ZREM', refused, id)
  end
  return true
end

local function wants(shard)
  if shard == FINALIZE then return status == 'finalizing' end
  return status == 'queued' or status == 'running'
end

local function let_go(shard)
  redis.call('ZREM', leases, shard)
  redis.call('HDEL', owners, shard)
  redis.call('HDEL', fractions, shard)
  if status == 'cancelling' and redis.call('ZCARD', leases) == 0 then move('cancelled') end
end
"""
)


def _script(body: str) -> str:
    return _PREAMBLE + body


# spec, plan, posted ('' without an idempotency key), keep_s, max_jobs, package, shards... -> 'made', 'known' where
# the idempotency key has made a job already, 'full' where max_jobs are not over. It may run twice, since the
# connection may have broken before the answer came.
CREATE = _script("""
if status ~= 'unknown' then return 'made' end
local posted, keep_s, max_jobs = ARGV[4], ARGV[5], tonumber(ARGV[6])
if posted ~= '' and redis.call('EXISTS', redis.call('HGET', posted, 'job') or '') == 1 then return 'known' end
local n_jobs = 0
for state in pairs(MOVES) do
  if not TERMINAL[state] then n_jobs = n_jobs + redis.call('ZCARD', in_state .. state) end
end
if n_jobs >= max_jobs then return 'full' end
local seq = redis.call('INCR', sequence)
redis.call('HSET', job, 'status', 'queued', 'seq', seq, 'created_at', now, 'n_shards', #ARGV - 7,
           'spec', ARGV[2], 'plan', ARGV[3], 'package', ARGV[7])
redis.call('ZADD', jobs, seq, id)
redis.call('ZADD', in_state .. 'queued', seq, id)
wait(ARGV, 8)
if posted ~= '' then
  redis.call('UNLINK', posted)
  redis.call('HSET', posted, 'id', id, 'job', job, 'planned', ARGV[3] ~= '' and 1 or 0)
  redis.call('EXPIRE', posted, keep_s)
end
return 'made'
""")

# shard, owner -> 1 where the lease was taken. Refused where the shard is done, leased (also if stale: the sweeper puts
# it back) or not wanted.
CLAIM = _script("""
local shard, owner = ARGV[2], ARGV[3]
if not wants(shard) or redis.call('ZREM', waiting, shard) == 0 then return 0 end
if redis.call('ZCARD', waiting) == 0 then redis.call('ZREM', turns, id) end
redis.call('ZADD', leases, now, shard)
redis.call('HSET', owners, shard, owner)
if status == 'queued' then
  redis.call('HSET', job, 'started_at', now)
  move('running')
end
return 1
""")

# shard (PLAN), owner, plan, shards... -> 1 where this call has set the plan, and its shards are to be sent
SET_PLAN = _script("""
local shard, owner = ARGV[2], ARGV[3]
if redis.call('HGET', owners, shard) ~= owner then return 0 end
let_go(shard)
if not wants(shard) then return 0 end
redis.call('HSET', job, 'plan', ARGV[4], 'n_shards', #ARGV - 4)
wait(ARGV, 5)
return 1
""")

# shard, owner, fraction -> the job's state; nothing where another worker holds the lease by now
BEAT = _script("""
local shard, owner, fraction = ARGV[2], ARGV[3], ARGV[4]
if redis.call('HGET', owners, shard) ~= owner then return false end
redis.call('PERSIST', job) -- does nothing; but at maxmemory a script may go on that has written before
redis.call('ZADD', leases, now, shard)
if shard ~= FINALIZE and shard ~= PLAN and redis.call('HGET', fractions, shard) ~= fraction then
  redis.call('HSET', fractions, shard, fraction)
  if tonumber(fraction) > 0 then
    redis.call('HSETNX', job, 'first_done', fraction)
    redis.call('HSETNX', job, 'first_done_at', now)
    redis.call('HSET', job, 'last_done_at', now)
  end
end
return status
""")

# shard, owner -> 1 where the shard waits again
RELEASE = _script("""
local shard, owner = ARGV[2], ARGV[3]
if redis.call('HGET', owners, shard) ~= owner then return 0 end
let_go(shard)
if not wants(shard) then return 0 end
wait_first(shard)
return 1
""")

# found -> what the first worker that opened the job has found: this, if there was none before
AGREE = _script("""
if status ~= 'unknown' then redis.call('HSETNX', job, 'found', ARGV[2]) end
return redis.call('HGET', job, 'found') or ARGV[2]
""")

# owner, reason, shard -> 1 where the shard waits again, for another worker than this one
REFUSE = _script("""
local owner, reason, shard = ARGV[2], ARGV[3], ARGV[4]
if TERMINAL[status] or status == 'unknown' then return 0 end
redis.call('ZADD', refused, 'NX', now, id)
redis.call('HSET', refusals, owner, reason)
if redis.call('HGET', owners, shard) ~= owner then return 0 end
let_go(shard)
if not wants(shard) then return 0 end
wait({shard})
return 1
""")

# n_cut (how often the job had been cut when its plan was read), plan, shards... -> 1 where the job is cut anew by this
# call: all that was done is dropped, and these shards are to be sent
CUT_AGAIN = _script("""
if status ~= 'running' or (redis.call('HGET', job, 'n_cut') or '1') ~= ARGV[2] then return 0 end
drop_work()
redis.call('HSETNX', job, 'first_plan', redis.call('HGET', job, 'plan'))
redis.call('HDEL', job, 'first_done', 'first_done_at', 'last_done_at')
redis.call('HSET', job, 'plan', ARGV[3], 'n_shards', #ARGV - 3, 'n_cut', ARGV[2] + 1)
wait(ARGV, 4)
return 1
""")

# shard, owner ('' for the one whose lease is stale), lease_s, max_attempts, max_losses, error -> 1 where the shard
# waits again. A whole worker that is gone is counted separately, since something else may have killed it.
RETRY = _script("""
local shard, owner, lease_s, problem = ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[7]
local beat, holder = redis.call('ZSCORE', leases, shard), redis.call('HGET', owners, shard)
if not beat then return 0 end
if owner == '' and tonumber(beat) > now - lease_s then return 0 end
if owner ~= '' and holder ~= owner then return 0 end
local seen = tonumber(redis.call('ZSCORE', workers, holder or '') or 0)
local is_gone = owner == '' and (seen < now - lease_s / 2 or seen > now + lease_s / 2)
local count, most = is_gone and 'lost ' .. shard or shard, tonumber(is_gone and ARGV[6] or ARGV[5])
let_go(shard)
if not wants(shard) then return 0 end
local tries = redis.call('HINCRBY', attempts, count, 1)
if tries >= most then
  redis.call('HSET', job, 'error', problem)
  move('failed')
  return 0
end
if is_gone or tries == 1 then wait_first(shard) else wait_last(shard) end
return 1
""")

# shard, draft, n_chunks, owner -> 1 where this was the last shard. The partial is accepted from any worker: its bytes
# are the same.
COMPLETE = _script("""
local shard, draft, n_chunks, owner = ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
local is_of_plan = redis.call('ZSCORE', waiting, shard) or redis.call('ZSCORE', leases, shard)
if status ~= 'running' or not is_of_plan then
  redis.call('UNLINK', draft)
  if redis.call('HGET', owners, shard) == owner then let_go(shard) end
  return 0
end
if redis.call('LLEN', draft) ~= n_chunks then
  return redis.error_reply('ERR the partial of ' .. shard .. ' came in incomplete')
end
redis.call('RENAME', draft, partial_of .. shard)
redis.call('PERSIST', partial_of .. shard)
redis.call('ZREM', waiting, shard)
redis.call('SADD', done, shard)
let_go(shard)
if redis.call('SCARD', done) < tonumber(redis.call('HGET', job, 'n_shards')) then return 0 end
move('finalizing')
wait({FINALIZE})
return 1
""")

# draft, n_blocks, about, summary, block_rows, owner -> 1 where the job succeeded by this call
SAVE_TABLE = _script("""
local draft, n_blocks, owner = ARGV[2], tonumber(ARGV[3]), ARGV[7]
if status ~= 'finalizing' then
  redis.call('UNLINK', draft)
  if redis.call('HGET', owners, FINALIZE) == owner then let_go(FINALIZE) end
  return 0
end
if redis.call('LLEN', draft) ~= n_blocks then return redis.error_reply('ERR the table came in incomplete') end
redis.call('RENAME', draft, tbl)
redis.call('PERSIST', tbl)
redis.call('HSET', result, 'about', ARGV[4], 'summary', ARGV[5], 'block_rows', ARGV[6])
move('succeeded')
return 1
""")

# error -> 1 where the job failed by this call
FAIL = _script("""
if not move('failed') then return 0 end
redis.call('HSET', job, 'error', ARGV[2])
return 1
""")

# -> the state after the call, 1 where this call has stopped the job. Also how the sweeper finishes a `cancelling` job
# that nobody works on any more.
CANCEL = _script("""
local moved = move('cancelling')
if status == 'cancelling' and redis.call('ZCARD', leases) == 0 then move('cancelled') end
return {status, moved and 1 or 0}
""")

# keep_s -> the state after the call; a job in a terminal state becomes a tombstone. Its plan stays where the request
# that made it may still be repeated.
EXPIRE = _script("""
if move('expired') then
  redis.call('UNLINK', result, tbl)
  redis.call('ZREM', jobs, id)
end
if status == 'expired' and redis.call('ZREM', finished, id) == 1 then
  redis.call('ZADD', tombstones, now, id)
  redis.call('HDEL', job, 'error', 'found')
  if now - redis.call('HGET', job, 'created_at') > tonumber(ARGV[2]) then
    redis.call('HSET', job, 'plan', '')
    redis.call('HDEL', job, 'first_plan')
  end
end
return status
""")

# -> nothing; the tombstone is removed
FORGET = _script("""
if status ~= 'expired' and status ~= 'unknown' then return end
redis.call('UNLINK', job)
redis.call('ZREM', finished, id)
redis.call('ZREM', tombstones, id)
redis.call('ZREM', in_state .. 'expired', id)
""")

# lost_s -> the shards that have been waiting for longer; from now on they count as sent just now
RESEND = _script("""
if status == 'cancelling' then return {} end
local lost = redis.call('ZRANGEBYSCORE', waiting, '-inf', now - tonumber(ARGV[2]))
for _, shard in ipairs(redis.call('ZRANGEBYSCORE', waiting, now + tonumber(ARGV[2]), '+inf')) do
  lost[#lost + 1] = shard -- sent before the clock was set back
end
if #lost > 0 then wait(lost) end
return lost
""")


def _of_any(key: Callable[[str], str]) -> str:
    """Lua expression for this key of the job `id`."""
    return f"'{key(chr(39) + ' .. id .. ' + chr(39))}'"


# turn_s, unfit jobs... -> the job whose turn it is, and the first of its shards that wait; nothing where none waits.
# A job keeps its turn for turn_s, so that a short one is done in one go, and then goes to the end of the queue.
NEXT = f"""
local turns = KEYS[1]
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1e6
local is_unfit = {{}}
for i = 2, #ARGV do is_unfit[ARGV[i]] = true end
local place = 0
while true do
  local id = redis.call('ZRANGE', turns, place, place)[1]
  if not id then return false end
  local job = {_of_any(keys.job)}
  local shard = redis.call('ZRANGE', {_of_any(keys.waiting)}, 0, 0)[1]
  local began = tonumber(redis.call('HGET', job, 'turn_began') or now)
  if is_unfit[id] then
    place = place + 1
  elseif not shard then
    redis.call('ZREM', turns, id)
  elseif now - began > tonumber(ARGV[1]) or began > now + 1 then -- the clock may have been set back
    redis.call('HDEL', job, 'turn_began')
    redis.call('ZADD', turns, now, id)
  else
    redis.call('PERSIST', job) -- see BEAT
    redis.call('HSETNX', job, 'turn_began', now)
    return {{id, shard}}
  end
end
"""

# -> a job's hash, how many shards are done, and the fractions of those being worked on
LOAD = """
return {redis.call('HGETALL', KEYS[1]), redis.call('SCARD', KEYS[2]), redis.call('HVALS', KEYS[3])}
"""
