-- KEYS[1] record; ARGV: token, fingerprint, lease in µs, ttl in ms, at most once ("1" or "")
-- A record is a hash: token, print, and either lease (when it ends) or result.
local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]
local r = redis.call('HMGET', KEYS[1], 'token', 'print', 'lease', 'result')
if r[1] then
	if r[2] ~= ARGV[2] then
		return {'mismatch'}
	elseif r[4] then
		return {'done', redis.call('PTTL', KEYS[1]), r[4]}
	elseif r[1] ~= ARGV[1] then
		local left = tonumber(r[3]) - now
		if left > 0 then
			return {'busy', left}
		elseif ARGV[5] == '1' then
			return {'unknown'}
		end
	end
end
redis.call('HSET', KEYS[1], 'token', ARGV[1], 'print', ARGV[2], 'lease', string.format('%d', now + ARGV[3]))
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return {'claimed'}
