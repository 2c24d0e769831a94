-- KEYS[1] record; ARGV: token, verb (extend, complete, release), lease in µs or result
-- Returns 1, or 0 where the claim is not the token's.
local r = redis.call('HMGET', KEYS[1], 'token', 'lease')
if not r[1] then
	return ARGV[2] == 'release' and 1 or 0
elseif r[1] ~= ARGV[1] then
	return 0
elseif not r[2] then
	return ARGV[2] == 'complete' and 1 or 0
elseif ARGV[2] == 'extend' then
	local t = redis.call('TIME')
	local now = t[1] * 1000000 + t[2]
	redis.call('HSET', KEYS[1], 'lease', string.format('%d', now + ARGV[3]))
	local ms = math.floor(ARGV[3] / 1000) + 2 -- after the lease, whatever is rounded
	if redis.call('PTTL', KEYS[1]) < ms then
		redis.call('PEXPIRE', KEYS[1], ms)
	end
elseif ARGV[2] == 'complete' then
	redis.call('HDEL', KEYS[1], 'lease')
	redis.call('HSET', KEYS[1], 'result', ARGV[3])
else
	redis.call('DEL', KEYS[1])
end
return 1
